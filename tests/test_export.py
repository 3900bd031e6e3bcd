"""`python -m byol_core.export`: what is read back gives the features of the network, and else nothing is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from byol_core import export
from byol_core.export import main
from byol_core.pretrained import load_pretrained
from tests.helpers.forking import REPOSITORY


def run(backbone: Path, out: Path) -> int:
    return main(["--checkpoint", str(backbone), "--out", str(out)])


def features(backbone: Path, images: Tensor) -> Tensor:
    with torch.no_grad():
        return load_pretrained(backbone).backbone(images)


def printed(out: str, path: Path) -> float:
    """The difference that was printed."""
    pattern = (rf"{re.escape(str(path))}: images \(n, 3, 16, 16\) to features \(n, 128\); read back, they differ by (\S+) at "
               r"most, where the largest is \S+" "\n"
               r"images: RGB in \[0, 1\], less the mean \(0.4, 0.5, 0.6\), divided by the std \(0.2, 0.3, 0.4\)" "\n")
    found = re.fullmatch(pattern, out)
    assert found, out
    return float(found[1])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_gives_the_same_features_for_any_number_of_images(backbone: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "backbone.ts"
    assert run(backbone, out) == 0
    assert printed(capsys.readouterr().out, out) < 1e-5
    script = torch.jit.load(out)
    for count in (1, 7):
        images = torch.randn(count, 3, 16, 16)
        assert torch.allclose(script(images), features(backbone, images), atol=1e-5)
    assert not script.training


def test_onnx_gives_the_same_features_for_any_number_of_images(backbone: Path, tmp_path: Path, capsys) -> None:
    runtime, out = pytest.importorskip("onnxruntime"), tmp_path / "backbone.onnx"
    pytest.importorskip("onnxscript")
    assert run(backbone, out) == 0
    assert printed(capsys.readouterr().out, out) < 1e-4
    session = runtime.InferenceSession(str(out))
    for count in (1, 7):
        images = torch.randn(count, 3, 16, 16)
        found, = session.run(["features"], {"images": images.numpy()})
        assert torch.allclose(torch.from_numpy(found), features(backbone, images), atol=1e-4)


@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_a_file_that_gives_other_features_is_not_kept(backbone: Path, tmp_path: Path, monkeypatch, capsys,
                                                      error: float) -> None:
    monkeypatch.setattr(export, "_torchscript", lambda network, images: (b"wrong", lambda images: network(images) + error))
    assert run(backbone, tmp_path / "wrong.ts") == 1
    assert "read back, features differ by up to" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("missing", export.NEEDED[".onnx"])
def test_without_the_packages_of_onnx_it_says_what_to_install(backbone: Path, tmp_path: Path, monkeypatch, capsys,
                                                              missing: str) -> None:
    for package in export.NEEDED[".onnx"]:
        monkeypatch.setitem(sys.modules, package, None if package == missing else sys)
    assert run(backbone, tmp_path / "backbone.onnx") == 2
    error = capsys.readouterr().err
    assert missing in error and error.endswith("- pip install onnx onnxscript onnxruntime\n") and error.count("\n") == 1


@pytest.mark.parametrize("out, message", [("backbone.pb", "give a name that ends in .onnx, or in .ts"),
                                          ("nowhere/backbone.ts", "there is no such folder")])
def test_wrong_input_is_one_line_and_code_two(backbone: Path, tmp_path: Path, capsys, out: str, message: str) -> None:
    assert run(backbone, tmp_path / out) == 2
    assert run(tmp_path / "gone", tmp_path / "backbone.ts") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert message in first and "no such file or folder" in second


def test_help_does_not_load_torch() -> None:
    script = ("import sys\nfrom byol_core.export import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
              "sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and "--out FILE" in done.stdout and "--data" not in done.stdout
