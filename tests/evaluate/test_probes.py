"""Neighbours and probes against hand calculations and scikit-learn itself; SGD against the update written out by hand."""

from unittest import mock

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from byol_core.evaluate import probes, scoring
from byol_core.evaluate.features import Features, embed
from byol_core.evaluate.probes import (Classifier, LinearProbe, classifier_accuracy, few_label_accuracy, fit_classifier,
                                       knn_accuracy, load_classifier, unconverged)
from byol_core.evaluate.scoring import Scorer
from byol_core.pretrained import untrained_backbone
from byol_core.runtime import Runtime


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


def test_knn_weighs_a_near_neighbour_above_two_that_are_further_off() -> None:
    height = 0.75 ** 0.5  # of two neighbours at 60 degrees: exp(1 / 0.1) is more than 2 exp(0.5 / 0.1)
    fit = torch.tensor([[1.0, 0.0], [0.5, height], [0.5, -height]])
    assert knn_accuracy(fit, torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]]), torch.tensor([0]), k=3) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_knn_takes_any_dtype_and_with_fewer_images_than_neighbours_uses_them_all(dtype: torch.dtype) -> None:
    train = clusters(per_class=2)
    x = train.x.to(dtype)
    assert knn_accuracy(x, train.y, x, train.y, k=200) == 1.0


def test_default_classifier_is_logistic_regression_on_standardised_features() -> None:
    train, test = clusters(noise=1.5), clusters(noise=1.5, seed=1)
    x = train.x.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    probe = LogisticRegression(max_iter=10000, random_state=42).fit(((x - mean) / std).numpy(), train.y.numpy())
    expected = (probe.predict(((test.x.double() - mean) / std).numpy()) == test.y.numpy()).mean()
    assert 0.5 < expected < 0.99
    assert classifier_accuracy(train.x, train.y, test.x, test.y) == pytest.approx(expected)


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
    with pytest.raises(ValueError, match="LinearProbe.* at least 2 classes"):
        LinearProbe().fit(train.x.numpy(), np.zeros(len(train.y)))


def test_few_label_accuracy_sees_so_many_labels_of_every_class() -> None:
    train, test = clusters(), clusters(seed=1)
    with mock.patch.object(LogisticRegression, "fit", autospec=True, side_effect=LogisticRegression.fit) as fit:
        accuracy = few_label_accuracy(train, test, per_class=2)
    assert [np.bincount(call.args[2]).tolist() for call in fit.call_args_list] == [[2, 2, 2]] * 10 and 0.8 < accuracy <= 1
    assert few_label_accuracy(train, test, per_class=2) == accuracy


def test_classifiers_are_found_by_name_and_one_with_chance_in_it_has_a_seed() -> None:
    assert load_classifier("logistic") is None and isinstance(load_classifier("knn"), Pipeline)
    forest = load_classifier("sklearn.ensemble.RandomForestClassifier")
    assert isinstance(forest, RandomForestClassifier) and forest.random_state == 42


@pytest.mark.parametrize("name", ["svm", "sklearn.svm.Nope", "no_such_module.X", "collections.Counter", "sklearn.svm.SVR",
                                  "sklearn.cluster.KMeans", "sklearn.preprocessing.StandardScaler"])
def test_a_classifier_that_is_none_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"--classifier {name}"):
        load_classifier(name)


def scorer_of(fit: Features, test: Features, classifier: Classifier | None = None) -> Scorer:
    """One that is given the features of its images."""
    scorer = object.__new__(Scorer)
    scorer.classifier, scorer.runtime = classifier, Runtime("cpu")
    scorer.features = lambda backbone: (fit, test)  # type: ignore[method-assign]
    return scorer


@pytest.mark.parametrize("missing", [0, 2])
def test_a_class_without_an_image_to_fit_on_takes_no_measure_away(missing: int) -> None:
    train, test = clusters(), clusters(seed=1)
    there = train.y != missing
    scorer = scorer_of(Features(train.x[there], train.y[there]), test)
    assert set(scorer.measure(nn.Identity())) == {"knn", "linear", "linear_1", "linear_5"}


def test_convergence_is_seen_through_a_pipeline_and_constant_features_do_no_harm() -> None:
    x, y = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    x[:, 2] = 1.5
    fitted = fit_classifier(x, y)
    assert unconverged(fitted) is None and np.isfinite(fitted[-1].coef_).all()  # type: ignore[index]
    remark = unconverged(fit_classifier(x, y, make_pipeline(StandardScaler(), LogisticRegression(max_iter=1))))
    assert remark is not None and "LogisticRegression did not converge within max_iter=1" in remark


def digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 64) pixels from 0 to 16, and what they show."""
    x, y = load_digits(return_X_y=True)
    return x.astype(np.float32), y


def test_sgd_and_scikit_learn_agree_on_embeddings_of_the_digits() -> None:
    x, y = map(torch.from_numpy, digits())
    x = embed(untrained_backbone("conv6", False, 8, seed=0)[0], [x.view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16])
    held_out = torch.arange(len(y)) % 5 == 0
    parts = x[~held_out], y[~held_out], x[held_out], y[held_out]
    by_sklearn, by_sgd = classifier_accuracy(*parts), classifier_accuracy(*parts, LinearProbe())
    assert by_sklearn > 0.9 and by_sgd == pytest.approx(by_sklearn, abs=0.02)  # one is regularised, the other stops early


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
    x, y = digits()
    plain = LinearProbe(epochs=5).fit(x, y).predict(x)
    assert (LinearProbe(epochs=5).fit(1e-3 * x + 7, y).predict(1e-3 * x + 7) == plain).mean() > 0.99
    assert (plain == y).mean() > 0.9


def test_equal_seeds_give_equal_layers_and_other_seeds_do_not() -> None:
    layers = [LinearProbe(epochs=1, batch_size=64, seed=seed).fit(*digits()).layer.weight for seed in (0, 0, 1)]
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


def test_a_run_on_a_large_set_is_measured_by_sgd_unless_a_classifier_is_asked_for(monkeypatch) -> None:
    fitted: list[str] = []
    monkeypatch.setattr(scoring, "accuracy_of_probe", lambda fit, test, classifier: (
        fitted.append(type(classifier).__name__), (0.5, None, None))[1])
    monkeypatch.setattr(scoring, "FEW_LABELS", ())
    for limit, classifier in ((10**9, None), (10, None), (10, GaussianNB())):
        monkeypatch.setattr(probes, "SKLEARN_UP_TO", limit)
        scorer_of(clusters(), clusters(seed=1), classifier).measure(nn.Identity())
    assert fitted == ["NoneType", "LinearProbe", "GaussianNB"]
