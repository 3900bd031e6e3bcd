"""Wrong input: one line that says what to do, exit code 2, and nothing begun."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from byol_core.images import image_set
from byol_core.run.folder import open_run_folder
from byol_core.system import distributed
from tests.helpers.forking import REPOSITORY
from tests.helpers.runs import SMALL, run

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

WRONG = [
    (["--data", "imsg"], "no such folder: imsg - did you mean imgs?"),
    (["--data", "nowhere/at/all"], "no such folder: nowhere/at/all - check --data"),
    (["--data", "imgs/class0/000.png"], "is a file"),
    (["--data", "empty"], "no images under empty: looked for .jpg"),
    (["--batch-size", "17"], "16 images < --batch-size 17 - use --batch-size 16 or less"),
    (["--batch-size", "1"], "batch of 1 per process and micro-batch"),
    (["--batch-size", "6", "--accum-steps", "4"], "use a multiple of 4"),
    (["--arch", "resnet19"], "unknown arch 'resnet19' - did you mean resnet18?"),
    (["--arch", "squeezenet1_0"], "arch 'squeezenet1_0' does not end in a linear layer"),
    (["--arch", "alexnet"], "the network cannot take 16-pixel images"),
    (["--arch", "mnasnet0_5", "--small-stem"], "--small-stem is for ResNets, not for mnasnet0_5"),
    (["--device", "cuda"], "use --device cpu"),
    (["--device", "abacus"], "--device abacus is not a device"),
    (["--classifier", "sklearn.svm.NoSuch"], "--classifier sklearn.svm.NoSuch"),
    (["--eval-data", "flat"], "--eval-data flat has fewer than the 2 classes"),
    (["--eval-data", "strange"], "no class of --eval-data"),
    (["--eval-data", "gone"], "no such folder: gone - check --eval-data"),
    (["--resume", "gone.pt"], "no such file: gone.pt"),
    (["--init-from", "imgs/class0/000.png"], "damaged or not a checkpoint"),
    (["--small-stem"], "--small-stem is for ResNets"),
    (["--warmup-epochs", "1e308"], "is longer than the run"),
    (["--lr", "1e308"], "is no learning rate"),
    (["--scheduler", "plateau", "--warmup-epochs", "1"], "--warmup-epochs has no effect with --scheduler plateau"),
    (["--data", ""], "--data is empty"),
    (["--out", "imgs/class0/000.png"], "cannot write to imgs/class0/000.png"),
    (["--out", ""], "--out is empty - name a folder, or . for this one"),
    (["--out", "o" * 300], "ooo: file name too long - choose another --out"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_input_is_one_line_and_code_2_before_any_training(image_folder: Callable[..., Path], capsys,
                                                                arguments: list[str], message: str) -> None:
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("it is right here")
    data = image_folder()
    for folder in ("flat", "strange/one", "strange/other"):
        image_folder(folder, classes=0, per_class=3)
    Path("empty").mkdir()
    right = [] if "--data" in arguments else ["--data", data.name]
    assert run(*right, "--epochs", 1, "--out", "out", *SMALL, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not Path("out").exists()  # nothing was begun


@pytest.mark.parametrize("arguments, message", [
    (["--lr", "nan"], "argument --lr: must be a finite number above 0, got nan"),
    (["--lr", "0"], "got 0"),
    (["--lr", "-1"], "got -1"),
    (["--epochs", "-1"], "argument --epochs: must be a whole number from 0 to 1000000000, got -1"),
    (["--epochs", "9" * 401], "argument --epochs: must be a whole number from 0 to 1000000000, got 9999"),
    (["--workers", "1000000"], "argument --workers: must be auto or a whole number from 0 to 256, got 1000000"),
    (["--epochs", "1.5"], "got 1.5"),
    (["--image-size", "7"], "8 or more, got 7"),
    (["--weight-decay", "inf"], "got inf"),
    (["--tau-base", "1.5"], "must be a number in [0, 1], got 1.5"),
    (["--amp", "bf61"], "invalid choice: 'bf61'"),
    (["--epoch", "3"], "unrecognized arguments: --epoch 3 - did you mean --epochs?"),
    (["--minutes", "1", "--epochs=100"], "--epochs and --minutes both say how long to train"),
])
def test_a_wrong_option_is_one_line_and_code_2(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(*arguments)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_folder_that_cannot_be_written_to_is_told_before_the_images_are_looked_for(image_folder: Callable[..., Path],
                                                                                     monkeypatch, capsys) -> None:
    monkeypatch.setattr(image_set, "walk", lambda *_: pytest.fail("it took a while for nothing"))
    data = image_folder()
    Path("out").touch()
    assert run("--data", data, "--epochs", 1, "--out", "out", *SMALL) == 2
    assert "cannot write to out: file exists" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused(image_folder: Callable[..., Path], capsys) -> None:
    with open_run_folder(Path("out"), may_be_used=False):
        assert run("--data", image_folder(), "--epochs", 1, "--out", "out", *SMALL) == 2
    said = capsys.readouterr().err
    assert re.search(rf"another run \(pid {os.getpid()} on {platform.node()} since 2.+\) is using out", said)


@pytest.mark.parametrize("name, value, message", [
    ("WORLD_SIZE", "abc", "WORLD_SIZE is 'abc', which is no whole number"),
    ("RANK", "", "WORLD_SIZE is 2, but RANK is not set"), ("MASTER_ADDR", "", "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
    ("RANK", "2", "WORLD_SIZE is 2, RANK 2"), ("RANK", "-1", "WORLD_SIZE is 2, RANK -1"),
    ("RANK", "one", "RANK is 'one', which is no whole number"),
    ("BYOL_TIMEOUT_S", "0", "BYOL_TIMEOUT_S is 0 - use 1 or more seconds"),
    ("BYOL_TIMEOUT_S", "10m", "BYOL_TIMEOUT_S is '10m', which is no whole number"),
    ("nobody else", "comes", "WORLD_SIZE is 2, but after 1 s the processes have not met at 127.0.0.1:0"),
])
def test_an_environment_that_is_none_of_torchruns_is_one_line_and_code_2(name: str, value: str, message: str, monkeypatch,
                                                                         capfd) -> None:
    monkeypatch.setattr(distributed, "MEETING_S", 1.0)
    for variable, usual in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(variable, usual)
    monkeypatch.setenv(name, value)
    assert run("--data", "imgs", "--out", "out", *SMALL) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1 and "unset " in error and not Path("out").exists()


def test_help_and_a_mistyped_flag_do_not_load_torch() -> None:
    script = ("import sys, runpy\nsys.argv = ['train.py', *sys.argv[1:]]\n"
              f"try:\n    runpy.run_path({str(REPOSITORY / 'train.py')!r}, run_name='__main__')\n"
              "except SystemExit:\n    pass\n"
              "sys.stderr.write(str(sorted({'torch', 'torchvision', 'sklearn', 'numpy'} & set(sys.modules))))")
    for argument in ("--help", "--epoch"):
        done = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, text=True, cwd=REPOSITORY)
        assert done.stderr.endswith("[]")
