"""Neighbours and probes against hand calculations and scikit-learn itself; SGD against the update written out by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from byol_core.evaluate import probes, scoring
from byol_core.evaluate.features import Features, embed_data
from byol_core.evaluate.probes import (LinearProbe, classifier_accuracy, few_label_accuracy, fit_classifier, knn_accuracy,
                                       load_classifier, unconverged)
from byol_core.evaluate.scoring import Scorer
from byol_core.images.digits import write_digits
from byol_core.images.image_set import scan
from byol_core.pretrained import untrained_backbone
from byol_core.runtime import Runtime
from byol_core.views.pixels import load_images
from byol_core.views.recipes import digits_recipes

TOLERANCE = 0.02  # of accuracy: 7 of 360 digits; one probe is regularised and the other stops early


def clusters(per_class: int = 30, classes: int = 3, dim: int = 5, noise: float = 0.3, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    return Features(centres[labels] + noise * torch.randn(len(labels), dim, generator=generator), labels)


def knn_by_definition(train: Features, test: Features, k: int, temperature: float) -> float:
    """Wu et al. 2018, section 3.4, image by image in float64."""
    hits = 0
    for x, y in zip(test.x.double().numpy(), test.y.numpy()):
        cosines = np.array([x @ t / np.linalg.norm(x) / np.linalg.norm(t) for t in train.x.double().numpy()])
        votes: dict[int, float] = {}
        for row in np.argsort(-cosines)[:k]:
            votes[int(train.y[row])] = votes.get(int(train.y[row]), 0.0) + np.exp(cosines[row] / temperature)
        hits += max(votes, key=lambda label: votes[label]) == y
    return hits / len(test.y)


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (5, 0.1), (20, 0.1), (20, 1.0)])
def test_knn_accuracy_equals_its_definition(k: int, temperature: float) -> None:
    train, test = clusters(noise=1.5), clusters(noise=1.5, seed=1)
    expected = knn_by_definition(train, test, k, temperature)
    assert 0.4 < expected < 0.99
    assert knn_accuracy(train.x, train.y, test.x, test.y, k, temperature) == pytest.approx(expected)


def test_knn_weights_decide_against_the_majority() -> None:
    """One neighbour at cosine 1 against two at cosine 0.5: exp(10) beats 2 exp(5)."""
    train = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5], [0.5, -(0.75**0.5)]])
    assert knn_accuracy(train, torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]]), torch.tensor([0]), k=3) == 1.0


def test_knn_with_fewer_images_than_neighbours_uses_them_all() -> None:
    train = clusters(per_class=2)
    assert knn_accuracy(train.x, train.y, train.x, train.y, k=200) == 1.0


def test_default_classifier_is_logistic_regression_on_standardised_features() -> None:
    train, test = clusters(noise=1.5), clusters(noise=1.5, seed=1)
    x = train.x.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    probe = LogisticRegression(max_iter=10000, random_state=42).fit(((x - mean) / std).numpy(), train.y.numpy())
    expected = (probe.predict(((test.x.double() - mean) / std).numpy()) == test.y.numpy()).mean()
    assert 0.5 < expected < 0.99
    assert classifier_accuracy(train.x, train.y, test.x, test.y) == pytest.approx(expected)


def test_constant_features_are_no_obstacle() -> None:
    train = clusters()
    x = torch.cat([train.x, torch.full((len(train.x), 2), 3.0)], dim=1)
    assert classifier_accuracy(x, train.y, x, train.y) > 0.9


def test_any_classifier_with_fit_and_predict_is_used_as_it_is() -> None:
    class Constant:
        def fit(self, features: np.ndarray, labels: np.ndarray) -> None:
            assert features.dtype == np.float32 and labels.dtype == np.int64

        def predict(self, features: np.ndarray) -> np.ndarray:
            return np.ones(len(features))

    train = clusters()
    assert classifier_accuracy(train.x.half(), train.y, train.x.half(), train.y, Constant()) == pytest.approx(1 / 3)


def test_what_is_no_classifier_or_no_classification_is_refused() -> None:
    train = clusters()
    with pytest.raises(TypeError, match="needs fit and predict, got object"):
        fit_classifier(train.x, train.y, object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2 classes"):
        fit_classifier(train.x, torch.zeros_like(train.y))


def test_few_label_accuracy_sees_so_many_labels_of_every_class(monkeypatch) -> None:
    seen = []
    real = LogisticRegression.fit

    def spy(self: LogisticRegression, x: np.ndarray, y: np.ndarray) -> LogisticRegression:
        seen.append(np.bincount(y).tolist())
        return real(self, x, y)

    monkeypatch.setattr(LogisticRegression, "fit", spy)
    train, test = clusters(), clusters(seed=1)
    accuracy = few_label_accuracy(train, test, per_class=2)
    assert seen == [[2, 2, 2]] * 10 and 0.8 < accuracy <= 1
    assert few_label_accuracy(train, test, per_class=2) == accuracy


@pytest.mark.parametrize("name, kind", [("knn", "Pipeline"), ("sklearn.svm.LinearSVC", "LinearSVC")])
def test_classifiers_are_found_by_name(name: str, kind: str) -> None:
    assert type(load_classifier(name)).__name__ == kind
    assert load_classifier("logistic") is None


@pytest.mark.parametrize("name", ["svm", "sklearn.svm.Nope", "no_such_module.X", "collections.Counter", "sklearn.svm.SVR",
                                  "sklearn.cluster.KMeans", "sklearn.preprocessing.StandardScaler"])
def test_a_classifier_that_is_none_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"--classifier {name}"):
        load_classifier(name)


def test_a_classifier_with_chance_in_it_has_a_seed() -> None:
    forest = load_classifier("sklearn.ensemble.RandomForestClassifier")
    assert forest.get_params()["random_state"] == 42  # type: ignore[union-attr]
    train, test = clusters(noise=3.0), clusters(noise=3.0, seed=1)
    accuracies = {classifier_accuracy(train.x, train.y, test.x, test.y,
                                      load_classifier("sklearn.tree.ExtraTreeClassifier")) for _ in range(5)}
    assert len(accuracies) == 1


@pytest.mark.parametrize("missing", [0, 2])
def test_a_class_without_an_image_to_fit_on_takes_no_measure_away(monkeypatch, missing: int) -> None:
    train, test = clusters(), clusters(seed=1)
    there = train.y != missing
    fit = Features(train.x[there], train.y[there])
    monkeypatch.setattr(Scorer, "features", lambda *_: (fit, test))
    scorer = object.__new__(Scorer)
    scorer.classifier, scorer.runtime = None, Runtime("cpu")
    assert set(scorer.measure(nn.Identity())) == {"knn", "linear", "linear_1", "linear_5"}


def test_knn_takes_any_dtype() -> None:
    train = clusters()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x: Tensor = train.x.to(dtype)
        assert knn_accuracy(x, train.y, x, train.y, k=1) == 1.0


class Hasty(LogisticRegression):
    def __init__(self) -> None:
        super().__init__(max_iter=1)


def test_convergence_is_seen_through_a_pipeline_and_constant_features_do_no_harm() -> None:
    x, y = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    x[:, 2] = 1.5
    fitted = fit_classifier(x, y)
    assert unconverged(fitted) is None and np.isfinite(fitted[-1].coef_).all()  # type: ignore[index]
    remade = fit_classifier(x, y, Hasty())
    remark = unconverged(remade)
    assert remark is not None and "Hasty did not converge within max_iter=1" in remark


def digits_features(root: Path, network: torch.nn.Module) -> tuple[Features, Features]:
    """(training features, held-out features) of the digits."""
    both = []
    for folder in write_digits(root):
        files = scan(folder)
        data = load_images(files, "device", torch.device("cpu"), lambda line: None)[0]
        rows, x = embed_data(network, data, digits_recipes()[0], torch.arange(len(files)), Runtime("cpu"))
        assert files.labels is not None
        both.append(Features(x, files.labels[rows]))
    return both[0], both[1]


@pytest.mark.slow
@pytest.mark.parametrize("network", ["untrained conv6", "pixels"])
def test_sgd_and_scikit_learn_agree_on_embeddings_of_the_digits(network: str, tmp_path: Path) -> None:
    backbone = torch.nn.Flatten() if network == "pixels" else untrained_backbone("conv6", False, 8, seed=0)[0]
    fit, test = digits_features(tmp_path / "digits", backbone)
    by_sklearn = classifier_accuracy(fit.x, fit.y, test.x, test.y)
    by_sgd = classifier_accuracy(fit.x, fit.y, test.x, test.y, LinearProbe())
    assert by_sklearn > 0.9 and by_sgd == pytest.approx(by_sklearn, abs=TOLERANCE)


@pytest.mark.parametrize("epochs, batch_size", [(2, 6), (1, 3)])
def test_sgd_follows_the_published_update_rule(epochs: int, batch_size: int) -> None:
    """Two steps in float64 by the formulas of the paper: Nesterov momentum 0.9, rate 1 then 1/2, no decay."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(6, 4)), np.array([0, 1, 2, 0, 1, 2])
    z = x - x.mean(0)
    z /= np.sqrt((z**2).sum(1).mean())
    z = np.hstack([z, np.ones((6, 1))])  # the bias is one more weight
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0)).numpy()
    weights, velocity = np.zeros((3, 5)), np.zeros((3, 5))
    for step, rate in enumerate((1.0, 0.5)):  # (1 + cos(pi step / 2)) / 2
        rows = order if batch_size == 6 else order[3 * step:3 * step + 3]
        logits = z[rows] @ weights.T
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        gradient = (probabilities - np.eye(3)[y[rows]]).T @ z[rows] / len(rows)
        velocity = 0.9 * velocity + gradient
        weights -= rate * (gradient + 0.9 * velocity)
    probe = LinearProbe(epochs, batch_size, lr=1.0).fit(x.astype(np.float32), y)
    found = torch.cat([probe.layer.weight, probe.layer.bias[:, None]], dim=1)
    assert np.allclose(found.detach().numpy(), weights, atol=1e-6)


def test_scale_and_shift_of_the_features_do_not_matter() -> None:
    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32)
    plain = LinearProbe(epochs=5).fit(x, y).predict(x)
    assert (LinearProbe(epochs=5).fit(1e-3 * x + 7, y).predict(1e-3 * x + 7) == plain).mean() > 0.99
    assert (plain == y).mean() > 0.9


def test_equal_seeds_give_equal_layers_and_other_seeds_do_not() -> None:
    x, y = load_digits(return_X_y=True)
    layers = [LinearProbe(epochs=1, batch_size=64, seed=seed).fit(x.astype(np.float32), y).layer.weight for seed in (0, 0, 1)]
    assert torch.equal(layers[0], layers[1]) and not torch.equal(layers[0], layers[2])


def test_labels_of_any_kind_come_back() -> None:
    x = np.array([[0.0], [0.1], [5.0], [5.1]], dtype=np.float32)
    probe = LinearProbe(epochs=20).fit(x, np.array(["cat", "cat", "dog", "dog"]))
    assert probe.predict(x).tolist() == ["cat", "cat", "dog", "dog"]


def test_constant_features_leave_the_weights_finite() -> None:
    probe = LinearProbe(epochs=3).fit(np.ones((6, 2), np.float32), np.array([0, 0, 0, 0, 1, 1]))
    assert torch.isfinite(probe.layer.weight).all() and probe.predict(np.ones((2, 2), np.float32)).tolist() == [0, 0]


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")}])
def test_numbers_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"LinearProbe.*{next(iter(wrong))}"):
        LinearProbe(**wrong)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 classes"):
        LinearProbe().fit(np.zeros((3, 2), np.float32), np.zeros(3))


@pytest.mark.slow
def test_sgd_and_scikit_learn_agree_on_many_rows() -> None:
    """20,000 rows of overlapping clusters, whose best possible accuracy both come near."""
    generator = np.random.default_rng(0)
    centres, y = generator.normal(size=(10, 64)) / 4, generator.integers(0, 10, 30_000)
    x = (centres[y] + generator.normal(size=(30_000, 64))).astype(np.float32)
    sklearn = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10000)).fit(x[:20_000], y[:20_000])
    sgd = LinearProbe().fit(x[:20_000], y[:20_000])
    accuracies = [(probe.predict(x[20_000:]) == y[20_000:]).mean() for probe in (sklearn, sgd)]
    assert 0.5 < accuracies[0] < 0.95 and accuracies[1] == pytest.approx(accuracies[0], abs=0.005)


@pytest.mark.slow
def test_a_run_on_a_large_set_is_measured_by_sgd_unless_a_classifier_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    data, held_out = (load_images(scan(folder), "device", torch.device("cpu"), lambda line: None)[0]
                      for folder in write_digits(tmp_path / "digits"))
    fitted: list[str] = []
    monkeypatch.setattr(scoring, "accuracy_of_probe", lambda fit, test, classifier: (
        fitted.append(type(classifier).__name__), (0.5, None, None))[1])
    monkeypatch.setattr(scoring, "FEW_LABELS", ())
    for limit, classifier in ((10**9, None), (10, None), (10, GaussianNB())):
        monkeypatch.setattr(probes, "SKLEARN_UP_TO", limit)
        scoring.Scorer(data, held_out, digits_recipes()[0], Runtime("cpu"), 0, classifier).measure(torch.nn.Flatten())
    assert fitted == ["NoneType", "LinearProbe", "GaussianNB"]
