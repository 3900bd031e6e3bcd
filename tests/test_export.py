"""`python -m byol_core.export`: what is read back gives the features of the network, and else nothing is written."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from byol_core import export
from byol_core.export import main
from byol_core.pretrained import load_pretrained


def run(backbone: Path, out: Path) -> int:
    return main(["--checkpoint", str(backbone), "--out", str(out)])


def torchscript(out: Path) -> Callable[[Tensor], Tensor]:
    script = torch.jit.load(out)
    assert not script.training
    return script


def onnx(out: Path) -> Callable[[Tensor], Tensor]:
    session = importlib.import_module("onnxruntime").InferenceSession(str(out))
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("ending, load, most", [(".ts", torchscript, 1e-5), (".onnx", onnx, 1e-4)])
def test_a_file_gives_the_same_features_for_any_number_of_images(
        backbone: Path, tmp_path: Path, capsys, ending: str, load: Callable[[Path], Callable], most: float) -> None:
    for package in export.NEEDED[ending]:
        pytest.importorskip(package)
    out = tmp_path / f"backbone{ending}"
    assert run(backbone, out) == 0
    said = re.fullmatch(
        rf"{re.escape(str(out))}: images \(n, 3, 16, 16\) to features \(n, 128\); read back, they differ by (\S+) at most, "
        r"where the largest is \S+" "\n"
        r"images: RGB in \[0, 1\], less the mean \(0.4, 0.5, 0.6\), divided by the std \(0.2, 0.3, 0.4\)" "\n",
        capsys.readouterr().out)
    assert said and float(said[1]) < most
    network = load(out)
    for count in (1, 7):
        images = torch.randn(count, 3, 16, 16)
        with torch.no_grad():
            assert torch.allclose(network(images), load_pretrained(backbone).backbone(images), atol=most)


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
    assert "--data" not in export.build_parser().format_help()  # which it has no use for
