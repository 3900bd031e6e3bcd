"""`python -m byol_core.embed`: rows, names and labels against images embedded one by one; what happens when it goes wrong."""

import json
import os
import re
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from byol_core import embed
from byol_core.embed import main
from byol_core.evaluate import features as evaluate
from byol_core.images.decoding import decode
from byol_core.pretrained import load_pretrained
from byol_core.views.pixels import plain_batches
from byol_core.views.recipes import plain_view
from tests.helpers.forking import REPOSITORY, run_code
from tests.helpers.modules import write_backbone
from tests.helpers.pictures import Folder


def run(backbone: Path, data: Path, out: Path, *arguments: str) -> int:
    return main(["--checkpoint", str(backbone), "--data", str(data), "--out", str(out), "--workers", "0", "--device", "cpu",
                 *arguments])


@pytest.mark.parametrize("size, workers", [((16, 16), "0"), ((30, 20), "2")])
def test_rows_are_the_features_of_the_named_files(backbone: Path, image_folder: Folder, tmp_path: Path, size: tuple[int, int],
                                                  workers: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(embed, "CHUNK", 4)  # names are written in pieces
    data, out = image_folder(classes=3, per_class=5, size=size), tmp_path / "e.npz"
    assert run(backbone, data, out, "--workers", workers) == 0
    with np.load(out) as file:
        assert set(file) == {"embeddings", "names", "labels", "classes", "skipped", "about"}
        assert file["embeddings"].dtype == np.float32 and file["embeddings"].shape == (15, 128)
        assert list(file["names"]) == [f"class{label}/{number:03d}.png" for label in range(3) for number in range(5)]
        assert list(file["classes"][file["labels"]]) == [name.split("/")[0] for name in file["names"]]
        assert file["labels"].dtype == np.int64 and len(file["skipped"]) == 0
        assert json.loads(str(file["about"]))["arch"] == "conv6"
        pretrained = load_pretrained(backbone)
        view = plain_view(pretrained.recipe)
        with torch.no_grad():
            for row, name in zip(file["embeddings"], file["names"]):
                alone = pretrained.backbone(view(decode(data / str(name)))[None])[0]
                assert np.allclose(row, alone.numpy(), atol=1e-5)
    assert capsys.readouterr().out == f"{out}: 15 embeddings of 128 numbers\n"


def test_broken_files_are_left_out_and_listed(backbone: Path, image_folder: Folder, tmp_path: Path, capsys) -> None:
    data = image_folder(classes=2, per_class=12)
    (data / "class1" / "003.png").write_bytes(b"broken")
    assert run(backbone, data, tmp_path / "e.npz") == 0
    with np.load(tmp_path / "e.npz") as file:
        assert file["embeddings"].shape == (23, 128) and list(file["skipped"]) == ["class1/003.png"]
        assert "class1/003.png" not in file["names"] and list(np.bincount(file["labels"])) == [12, 11]
        whole = file["embeddings"]
    printed = capsys.readouterr()
    assert "skipped class1/003.png: UnidentifiedImageError" in printed.err and "1 files could not be read" in printed.out
    (data / "class1" / "003.png").unlink()
    assert run(backbone, data, tmp_path / "clean.npz") == 0
    assert np.allclose(np.load(tmp_path / "clean.npz")["embeddings"], whole, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere refuse such names")
def test_odd_names_lead_back_to_their_files_and_are_escaped_in_classes_alone(backbone: Path, image_folder: Folder,
                                                                             tmp_path: Path, capsys) -> None:
    data = image_folder(classes=2, per_class=3)
    odd = [b"\xff\xfe.png", b"new\nline.png", "b\u00e4\u6f22 \U0001f600.png".encode()]
    for path, name in zip(sorted((data / "class1").iterdir()), odd):
        os.rename(path, os.fsencode(path.parent) + b"/" + name)
    os.rename(data / "class1", os.fsencode(data) + b"/\xff")
    assert run(backbone, data, tmp_path / "e.npz") == 0
    with np.load(tmp_path / "e.npz") as file:  # allow_pickle is off
        assert sorted(map(os.fsencode, file["names"][3:])) == sorted(b"\xff/" + name for name in odd)
        assert all((data / str(name)).is_file() for name in file["names"])
        assert list(file["labels"]) == [0, 0, 0, 1, 1, 1] and list(file["classes"]) == ["class0", "\\udcff"]
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "classes (to be read: odd bytes of a folder's name are written as escapes there)" in " ".join(
        capsys.readouterr().out.split())


def test_features_that_are_not_finite_write_nothing(image_folder: Folder, tmp_path: Path, capsys) -> None:
    out = tmp_path / "e.npz"
    out.write_bytes(b"the file before")
    assert run(write_backbone(tmp_path / "nan", float("nan")), image_folder(), out) == 1
    assert "error: the features of class0/000.png are not finite, so nothing was written" in capsys.readouterr().err
    assert out.read_bytes() == b"the file before"


def test_a_failed_write_keeps_the_file_before_and_leaves_no_other(backbone: Path, image_folder: Folder, tmp_path: Path,
                                                                  monkeypatch, capsys) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    place = tmp_path / "place"
    place.mkdir()
    (place / "e.npz").write_bytes(b"the file before")
    monkeypatch.setattr(embed.shutil, "copyfileobj", fail)
    assert run(backbone, image_folder(), place / "e.npz") == 1
    assert "cannot write" in capsys.readouterr().err
    assert [path.name for path in place.iterdir()] == ["e.npz"] and (place / "e.npz").read_bytes() == b"the file before"


def test_rows_are_not_held_in_memory_and_have_no_labels_in_a_flat_folder(backbone: Path, image_folder: Folder, tmp_path: Path,
                                                                         monkeypatch) -> None:
    """Each batch of features is gone before the next but one is made."""
    alive: list[weakref.ref] = []
    most = 0
    real = evaluate._features

    def count(*arguments):
        nonlocal most
        features = real(*arguments)
        alive.append(weakref.ref(features))
        most = max(most, sum(reference() is not None for reference in alive))
        return features

    monkeypatch.setattr(evaluate, "_features", count)
    monkeypatch.setattr(plain_batches, "__defaults__", (0, 4))
    assert run(backbone, image_folder(classes=0, per_class=40), tmp_path / "e.npz") == 0
    assert len(alive) == 10 and most <= 2
    with np.load(tmp_path / "e.npz") as file:
        assert "labels" not in file and "classes" not in file and len(file["names"]) == 40


def test_wrong_input_is_one_line_and_code_two(backbone: Path, image_folder: Folder, tmp_path: Path, capsys) -> None:
    data = image_folder()
    for source, images, out, message in ((tmp_path / "none", data, tmp_path / "e.npz", "no such file or folder"),
                                         (backbone, tmp_path / "none", tmp_path / "e.npz", "no such folder"),
                                         (backbone, data, tmp_path / "e.npy", "ends in .npz"),
                                         (backbone, data, tmp_path / "no" / "e.npz", "there is no such folder")):
        assert run(source, images, out) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and len(said.splitlines()) == 1
    for path in data.glob("class0/*.png"):
        path.write_bytes(b"broken")
    assert run(backbone, data, tmp_path / "e.npz") == 1 and not (tmp_path / "e.npz").exists()
    assert "images cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_the_readmes_recipe_runs_as_printed(backbone: Path, image_folder: Folder, tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    recipe = next(block for block in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
                  if '"embeddings.npz"' in block)
    data = image_folder(classes=2, per_class=10)
    (data / "class1" / "copy.png").write_bytes((data / "class1" / "003.png").read_bytes())
    assert run(backbone, data, tmp_path / "embeddings.npz") == 0
    assert "['class1/003.png' 'class1/copy.png']" in run_code(recipe, tmp_path)
