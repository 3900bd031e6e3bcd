"""Embeddings, neighbours and probes against hand calculations and scikit-learn itself."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from byol_core.evaluate.features import (Features, classifier_accuracy, embed, few_label_accuracy, fit_classifier,
                                         knn_accuracy, load_classifier, split, unconverged)
from byol_core.evaluate.scoring import Scorer


def clusters(per_class: int = 30, classes: int = 3, dim: int = 5, noise: float = 0.3, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    return Features(centres[labels] + noise * torch.randn(len(labels), dim, generator=generator), labels)


def test_embed_runs_in_eval_mode_without_gradients_and_restores_the_mode() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5))
    images = torch.rand(5, 3, 2, 2)
    before = backbone[1].running_mean.clone()
    features = embed(backbone, [images[:3], images[3:]])
    assert torch.allclose(features, images.flatten(1) / (1 + 1e-5) ** 0.5)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert backbone.training and torch.equal(backbone[1].running_mean, before)


def test_embed_takes_loaders_with_labels_and_returns_float32() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).double()
    images = torch.rand(4, 3, 1, 1, dtype=torch.float64)
    features = embed(backbone, [(images, torch.zeros(4))])
    assert features.dtype == torch.float32 and torch.allclose(features.double(), backbone(images), atol=1e-6)


def test_embed_names_what_is_not_finite_and_refuses_nothing_at_all() -> None:
    images = torch.zeros(4, 3, 1, 1)
    images[2] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 4 embeddings are not finite \(first: row 2\)"):
        embed(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), [images])
    with pytest.raises(ValueError, match="no images"):
        embed(nn.Linear(1, 1), [])


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


def test_split_holds_out_a_fifth_of_every_class() -> None:
    features = Features(torch.rand(100, 2), torch.arange(100) % 4)
    fit, test = split(features)
    assert len(fit) == 80 and len(test) == 20 and not set(fit) & set(test)
    assert torch.bincount(features.y[test]).tolist() == [5, 5, 5, 5]
    assert np.array_equal(split(features)[1], test)


def test_split_leaves_out_single_images_and_needs_two_classes() -> None:
    fit, test = split(Features(torch.rand(9, 2), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])))
    assert 8 not in fit and 8 not in test
    with pytest.raises(ValueError, match="at least 2 classes"):
        split(Features(torch.rand(5, 2), torch.tensor([0, 0, 0, 0, 1])))


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
    scorer.classifier = None
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


def test_half_precision_networks_give_float32_on_the_cpu() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).bfloat16()
    features = embed(backbone, [torch.rand(3, 3, 2, 2).bfloat16()])
    assert features.dtype == torch.float32 and features.device.type == "cpu"
