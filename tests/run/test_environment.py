"""The machine: libraries that do not fit, accelerators that are there or not (told apart by patches), and large folders."""

import io
import json
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

import train
from byol_core import embed
from byol_core.evaluate import __main__ as evaluate_command
from byol_core.images.image_set import scan
from byol_core.runtime import Runtime, choose_device, choose_precision
from byol_core.system.files import read_checkpoint
from tests.helpers.forking import PATIENCE_S, Forked
from tests.helpers.runs import SMALL

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
MPS, CUDA = torch.device("mps"), torch.device("cuda", 0)


class Mismatched:
    """Finds a torchvision that was built for another torch."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize("command", ["train", "evaluate", "embed"])
def test_libraries_that_do_not_fit_are_named(image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, command: str,
                                             capsys) -> None:
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.setattr(sys, "meta_path", [Mismatched(), *sys.meta_path])
    data = str(image_folder())
    if command == "train":
        code = train.main(["--data", data, "--out", "out", *SMALL])
    else:
        main = evaluate_command.main if command == "evaluate" else embed.main
        code = main(["--data", data, "--checkpoint", data])
    assert code == 2
    assert capsys.readouterr().err == (f"error: torch {torch.__version__} and torchvision {metadata.version('torchvision')} "
                                       "do not match - reinstall both together\n")


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="has an accelerator")
def test_a_run_without_an_accelerator_says_so(image_folder: Callable[..., Path], capsys) -> None:
    options = [option for option in SMALL if option not in ("--device", "cpu")]
    assert train.main(["--data", str(image_folder()), "--epochs", "0", "--out", "out", "--no-eval", *options]) == 0
    assert "device: cpu (no CUDA found); precision: " in capsys.readouterr().out


def patch_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")


def test_of_several_gpus_one_is_used_and_how_to_use_all_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_gpus(monkeypatch, 1)
    assert choose_device("auto") == (CUDA, "Some GPU")
    patch_gpus(monkeypatch, 3)
    assert choose_device("auto") == (CUDA, "Some GPU, 1 of 3 GPUs: torchrun --nproc-per-node=3 train.py ... uses all")
    with pytest.raises(ValueError, match="--device cuda:3: 3 CUDA devices found - use --device cpu"):
        choose_device("cuda:3")


def test_an_apple_gpu_is_used_in_float32_without_a_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == (MPS, "Apple GPU") and choose_device("mps") == (MPS, "as asked")
    assert choose_precision("auto", MPS) == (None, "no native bf16 on this MPS")
    runtime = Runtime(MPS)
    assert not runtime.scaler.is_enabled()
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: pytest.fail("not everything can be cast there"))
    with runtime.autocast():
        pass


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no measure of the peak there")
def test_a_hundred_thousand_names_take_little_memory(tmp_path: Path) -> None:
    names = [f"{top:03d}/a name of some forty characters {number:06d}.jpg" for top in range(50) for number in range(2000)]
    for top in range(50):
        (tmp_path / f"{top:03d}").mkdir()
    for name in names:
        os.close(os.open(tmp_path / name, os.O_CREAT | os.O_WRONLY))
    images = scan(tmp_path)
    assert len(images) == 100_000 and images.name(23_456) == names[23_456]
    # 52 characters and two numbers of 8 bytes each: in a worker process nothing else is copied
    assert len(pickle.dumps(images)) < 100_000 * (len(names[0]) + 8 + 8) + 10_000
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names))
    script = ("import sys\nfrom byol_core.images.image_set import scan\nfrom tests.fuzz import memory_peak\n"
              "before = memory_peak()\nfor place in sys.argv[1:]:\n    assert len(scan(place)) == 100_000\n"
              "print(memory_peak() - before)\n")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "list.txt", tmp_path], capture_output=True, text=True,
                          check=True, cwd=Path(__file__).parents[2])
    assert float(done.stdout.splitlines()[-1]) < 21  # MiB; Path objects alone would take over 50


def small_run(images: Path) -> list[str]:
    return ["--data", str(images), "--out", "out", "--epochs", "1", "--no-eval", *SMALL]


@pytest.mark.slow
def test_a_command_without_standard_streams_writes_whole_files(image_folder: Callable[..., Path]) -> None:
    """A file of the run that got a stream's number would take what is printed."""
    command = shlex.join([sys.executable, train.__file__, *small_run(image_folder())])
    assert subprocess.run(["sh", "-c", f"exec {command} <&- >&- 2>&-"]).returncode == 0
    assert read_checkpoint(Path("out/last.pt"))
    assert all(json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines())


def test_a_console_that_cannot_show_a_name_stops_no_run(image_folder: Callable[..., Path],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    words, shown = small_run(image_folder("bär")), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert train.main(words) == 0
    sys.stdout.flush()
    assert b"b\\xe4r" in shown.getvalue()


def train_in(folder: str, words: list[str]) -> int:
    os.chdir(folder)
    return train.main(words)


@pytest.mark.slow
def test_a_console_that_goes_away_stops_no_run(image_folder: Callable[..., Path]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    child = Forked(f"{__name__}:train_in", [os.getcwd(), small_run(image_folder())], writing, writing)
    os.close(writing)
    assert child.wait(PATIENCE_S) == 0 and Path("out/backbone.pt").exists()
