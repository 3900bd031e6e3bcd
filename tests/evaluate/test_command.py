"""`python -m byol_core.evaluate`: numbers against the run's own and scikit-learn; what people see when something is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torchvision.models import resnet18

from byol_core.evaluate import __main__ as evaluate_command
from byol_core.evaluate import probes
from byol_core.evaluate.__main__ import confusion_matrix, main
from byol_core.evaluate.features import embed_data
from byol_core.images.image_set import scan
from byol_core.pretrained import untrained_backbone
from byol_core.runtime import Runtime
from byol_core.system.files import export_backbone
from byol_core.views.pixels import load_images
from byol_core.views.recipes import ViewRecipe
from tests.helpers.pictures import Folder
from tests.helpers.runs import changed_copy


class Hasty(LogisticRegression):
    def __init__(self) -> None:
        super().__init__(max_iter=1)


class Clumsy(ClassifierMixin, BaseEstimator):
    def fit(self, features: np.ndarray, labels: np.ndarray) -> None:
        raise ZeroDivisionError("two left hands")

    def predict(self, features: np.ndarray) -> np.ndarray:
        raise AssertionError("never fitted")


@pytest.fixture
def without_few_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time of thirty probes where they are not what a test is about."""
    monkeypatch.setattr(evaluate_command, "FEW_LABELS", ())


def run(checkpoint: Path, data: Path, *arguments: object) -> int:
    return main(["--checkpoint", str(checkpoint), "--data", str(data), "--workers", "0", "--device", "cpu",
                 *map(str, arguments)])


def results(path: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for record in json.loads(path.read_text())["results"]:
        found.setdefault(record["network"], {})[record["metric"]] = record["accuracy"]
    return found


@pytest.mark.usefixtures("without_few_labels")
def test_a_damaged_checkpoint_gives_way_to_the_one_before(trained: Path, tmp_path: Path, capsys) -> None:
    for name in ("last.pt", "previous.pt"):
        shutil.copy(trained / name, tmp_path)
    (tmp_path / "last.pt").write_bytes(b"half")
    assert run(tmp_path, trained.parent / "imgs") == 0
    assert "warning: " in (said := capsys.readouterr().err) and "last.pt is damaged" in said and "used the one before" in said


# Numbers


def test_accuracies_equal_those_of_the_run_itself(trained: Path, tmp_path: Path, capsys) -> None:
    assert run(trained, trained.parent / "imgs", "--json", tmp_path / "r.json") == 0
    summary, found = json.loads((trained / "summary.json").read_text()), results(tmp_path / "r.json")
    assert list(found) == ["majority", "untrained", "online"]
    assert found["online"]["knn_20"] == pytest.approx(summary["knn"])
    assert found["online"]["linear"] == pytest.approx(summary["linear"])
    assert found["online"]["linear_5"] == pytest.approx(summary["linear_5"])
    assert found["untrained"]["knn_20"] == pytest.approx(summary["knn_untrained"])
    assert found["untrained"]["linear"] == pytest.approx(summary["linear_untrained"])
    assert found["majority"]["linear"] == pytest.approx(1 / 3, abs=0.1)
    output = capsys.readouterr()
    printed = output.out.splitlines()
    assert printed[0] == (f"fitted on 29 images of {trained.parent / 'imgs'}, "
                          "measured on the 7 held out of it, a fifth of every class")
    assert printed[1].split() == ["accuracy", "majority", "untrained", "online"]
    knn = next(line for line in printed if line.startswith("knn_20 ")).split()
    assert knn[3] == f"{summary['knn']:.1%}"
    assert output.err.count("note: knn_200 uses 29 neighbours, all images there are to fit on") == 1
    assert "knn_20 " not in output.err and "also fitted on" not in output.err


@pytest.mark.usefixtures("without_few_labels")
def test_every_metric_names_its_split(trained: Path, image_folder: Folder, tmp_path: Path) -> None:
    other = image_folder("other", classes=3, per_class=4, size=(20, 12))
    assert run(trained, trained.parent / "imgs", "--eval-data", other, "--json", tmp_path / "r.json") == 0
    written = json.loads((tmp_path / "r.json").read_text())
    assert {record["split"] for record in [*written["results"], written["confusion"]]} == {
        f"fitted on 36 images of {trained.parent / 'imgs'}, measured on 12 images of {other}"}
    assert sum(map(sum, written["confusion"]["counts"])) == 12


def test_confusion_matrix_is_scikit_learns_with_a_row_for_other_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    true, predicted = (torch.randint(0, 4, (50,), generator=generator) for _ in range(2))
    matrix = confusion_matrix(true, predicted, 4)
    assert matrix[:4].tolist() == sklearn.metrics.confusion_matrix(true, predicted).tolist()
    assert matrix[4].tolist() == [0, 0, 0, 0]
    assert confusion_matrix(torch.tensor([-1, 0]), torch.tensor([2, 0]), 4)[4].tolist() == [0, 0, 1, 0]


@pytest.mark.usefixtures("without_few_labels")
def test_many_classes_show_their_most_frequent_confusions(trained: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluate_command, "SHOWN_CLASSES", 2)
    counts = torch.tensor([[4, 0, 1], [3, 5, 0], [0, 0, 6], [0, 2, 0]])
    monkeypatch.setattr(evaluate_command, "confusion_matrix", lambda *_: counts)
    assert run(trained, trained.parent / "imgs") == 0
    assert [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-3:]] == [
        ["3", "class1 taken for class0"], ["2", "others taken for class1"], ["1", "class0 taken for class2"]]


@pytest.mark.usefixtures("without_few_labels")
def test_sgd_takes_over_by_size_and_logistic_regression_has_a_row_where_it_is_asked_for(
        trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert run(trained, trained.parent / "imgs") == 0
    assert "note: linear is scikit-learn's" in capsys.readouterr().err
    monkeypatch.setattr(probes, "SKLEARN_UP_TO", 10)
    assert run(trained, trained.parent / "imgs", "--classifier", "logistic", "--json", tmp_path / "r.json") == 0
    assert "note: linear is SGD" in capsys.readouterr().err
    summary = json.loads((trained / "summary.json").read_text())
    assert results(tmp_path / "r.json")["online"]["logistic"] == pytest.approx(summary["linear"])


@pytest.mark.slow
@pytest.mark.usefixtures("without_few_labels")
def test_torchvision_weights_stand_beside_the_same_architecture(image_folder: Folder, tmp_path: Path, capsys) -> None:
    """In the format of torch's files before 1.6 they are measured; in the present one they are found not to fit."""
    data, run_folder = image_folder(classes=2, per_class=6, size=(32, 32)), tmp_path / "run"
    run_folder.mkdir()
    about = {"arch": "resnet18", "small_stem": True, "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "seed": 0,
             "whole_image": False, "interpolation": "bicubic", "network": "online"}
    export_backbone(run_folder, untrained_backbone("resnet18", True, 32, 1)[0].state_dict(), about)
    published = {name: tensor for name, tensor in resnet18().state_dict().items() if "num_batches" not in name}
    torch.save(published, tmp_path / "resnet18.pth", _use_new_zipfile_serialization=False)
    assert run(run_folder, data, "--baseline-weights", tmp_path / "resnet18.pth", "--json", tmp_path / "r.json") == 0
    assert list(results(tmp_path / "r.json")) == ["majority", "untrained", "weights", "online"]
    del published["layer1.0.conv1.weight"]
    torch.save(published, tmp_path / "resnet18.pth")
    assert run(run_folder, data, "--baseline-weights", tmp_path / "resnet18.pth") == 2
    assert "does not fit resnet18: 'layer1.0.conv1.weight' is missing" in capsys.readouterr().err


# What people see when something is wrong


@pytest.mark.parametrize("classes, per_class, message", [
    (0, 6, "has fewer than the 2 classes that measuring needs"),
    (1, 6, "has fewer than the 2 classes that measuring needs"),
    (3, 1, "measuring needs at least 2 classes of 2 images"),
])
def test_labels_that_allow_no_measuring_are_refused(trained: Path, image_folder: Folder, classes: int, per_class: int,
                                                    message: str, capsys) -> None:
    assert run(trained, image_folder(classes=classes, per_class=per_class)) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and said.startswith("error: ")


def test_classes_with_few_images_shorten_the_label_curve(trained: Path, image_folder: Folder, capsys) -> None:
    assert run(trained, image_folder(classes=2, per_class=5)) == 0
    printed = capsys.readouterr()
    assert "note: no linear_5: a class has only 4 images to fit on" in printed.err
    assert "linear_1 " in printed.out and "linear_5 " not in printed.out


def test_features_that_are_not_finite_name_the_first_file(trained: Path, tmp_path: Path, capsys) -> None:
    diverged = changed_copy(trained, tmp_path / "nan", lambda tensor: tensor * torch.nan)
    assert run(diverged, trained.parent / "imgs") == 1
    assert "error: 36 of 36 embeddings are not finite (first: class0/000.png)\n" in capsys.readouterr().err


def test_the_file_named_is_that_of_the_first_bad_row(image_folder: Folder) -> None:
    class Picky(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.where(images.flatten(1).sum(1, keepdim=True) == worst, torch.nan, images.flatten(1))

    folder = image_folder(classes=2, per_class=4)
    (folder / "class0" / "001.png").write_bytes(b"unreadable, so that rows and files do not agree")
    folder = scan(folder)
    data = load_images(folder, "cpu", torch.device("cpu"), lambda line: None)[0]
    data.bad.report = lambda line: None
    runtime, recipe = Runtime("cpu"), ViewRecipe(16)
    with pytest.raises(RuntimeError, match="cannot be read"):  # one of eight is too many to pass over
        embed_data(nn.Flatten(), data, recipe, torch.arange(8), runtime)
    rows, features = embed_data(nn.Flatten(), data, recipe, torch.tensor([0, 2, 3, 5]), runtime)
    worst = features.sum(1)[2]
    with pytest.raises(ValueError, match=r"1 of 4 embeddings are not finite \(first: class0/003.png\)"):
        embed_data(Picky(), data, recipe, torch.tensor([0, 2, 3, 5]), runtime)


def test_collapsed_features_are_scored_with_a_warning_beside_the_majority(trained: Path, tmp_path: Path, capsys) -> None:
    collapsed = changed_copy(trained, tmp_path / "zero", lambda tensor: tensor * 0)
    assert run(collapsed, trained.parent / "imgs", "--json", tmp_path / "r.json") == 0
    said = capsys.readouterr().err
    assert "warning: the online network has collapsed" in said and "the untrained network has collapsed" not in said
    found = results(tmp_path / "r.json")
    assert found["online"]["knn_20"] <= 0.5 and found["online"].keys() == found["majority"].keys()
    assert any("collapsed" in note for note in json.loads((tmp_path / "r.json").read_text())["notes"])


def test_a_classifier_that_fails_is_named_with_its_reason(trained: Path, capsys) -> None:
    assert run(trained, trained.parent / "imgs", "--classifier", f"{__name__}.Clumsy") == 1
    assert (f"error: --classifier {__name__}.Clumsy failed on the features of the untrained network: two left hands\n"
            in capsys.readouterr().err)


@pytest.mark.usefixtures("without_few_labels")
def test_unknown_classes_count_as_wrong_and_are_reported(trained: Path, image_folder: Folder, tmp_path: Path, capsys) -> None:
    other = image_folder("other", classes=4, per_class=5)
    assert run(trained, trained.parent / "imgs", "--eval-data", other, "--json", tmp_path / "with.json") == 0
    assert "--data does not have: class3; their 5 images count as wrong" in capsys.readouterr().err
    shutil.rmtree(other / "class3")
    assert run(trained, trained.parent / "imgs", "--eval-data", other, "--json", tmp_path / "without.json") == 0
    with_it, without = (results(tmp_path / name)["online"] for name in ("with.json", "without.json"))
    assert with_it["linear"] == pytest.approx(without["linear"] * 15 / 20)
    counts = json.loads((tmp_path / "with.json").read_text())["confusion"]["counts"]
    assert sum(counts[-1]) == 5


@pytest.mark.usefixtures("without_few_labels")
def test_images_on_both_sides_are_counted_by_path_and_by_content(trained: Path, image_folder: Folder, capsys) -> None:
    data, other = image_folder(classes=2, per_class=10), image_folder("other", classes=2, per_class=3, size=(15, 15))
    for path in data.glob("*/00[0-4].png"):
        shutil.copy(path, path.with_name("copy of " + path.name))
    (other / "class0" / "linked.png").symlink_to(data / "class0" / "006.png")
    shutil.copy(data / "class1" / "007.png", other / "class1" / "copied.png")
    assert run(trained, data, "--eval-data", other) == 0
    assert ("warning: 2 of 8 images measured on are also fitted on (1 the same file, 1 a file of the same content)"
            in capsys.readouterr().err)
    assert run(trained, data) == 0
    assert "a file of the same content)" in capsys.readouterr().err


@pytest.mark.usefixtures("without_few_labels")
def test_any_classifier_gets_a_row_and_is_remarked_if_it_did_not_converge(trained: Path, tmp_path: Path, capsys) -> None:
    name = f"{__name__}.Hasty"
    assert run(trained, trained.parent / "imgs", "--classifier", name, "--json", tmp_path / "r.json") == 0
    assert f"note: {name} of online: Hasty did not converge within max_iter=1" in capsys.readouterr().err
    assert results(tmp_path / "r.json")["online"][name] > 0


def test_wrong_input_is_one_line_and_code_two_before_any_image_is_embedded(trained: Path, image_folder: Folder, tmp_path: Path,
                                                                           monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluate_command, "carry_out", lambda evaluation: pytest.fail("went on"))
    data, others, empty = trained.parent / "imgs", image_folder("others", classes=2), tmp_path / "empty"
    empty.mkdir()
    for label in (0, 1):
        (others / f"class{label}").rename(others / f"kind{label}")
    for arguments, message in ([(tmp_path / "none", data), "no such file or folder"],
                               [(trained, tmp_path / "none"), "no such folder"],
                               [(trained, data, "--eval-data", empty), "no images under"],
                               [(trained, data, "--eval-data", others), "no class of --eval-data"],
                               [(trained, data, "--classifier", "collections.Counter"), "--classifier collections.Counter"],
                               [(trained, data, "--json", tmp_path / "no" / "r.json"), "--json"],
                               [(trained, data, "--device", "tpu"), "--device tpu"],
                               [(trained, data, "--baseline-weights", trained / "config.json"), "--baseline-weights"]):
        assert run(*arguments) == 2  # type: ignore[arg-type]
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and len(said.splitlines()) == 1
    with pytest.raises(SystemExit) as exit_code:
        run(trained, data, "--clasifier", "knn")
    assert exit_code.value.code == 2 and "did you mean --classifier?" in capsys.readouterr().err


def test_too_many_broken_images_end_it_with_code_one(trained: Path, image_folder: Folder, capsys) -> None:
    data = image_folder(classes=2, per_class=8)
    for path in data.glob("*/00[0-2].png"):
        path.write_bytes(b"broken")
    assert run(trained, data) == 1
    said = capsys.readouterr().err
    assert "images cannot be read" in said and "skipped class0/000.png" in said
