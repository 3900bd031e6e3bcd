"""SGD on frozen features against scikit-learn's logistic regression and against the update written out by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from byol_core.evaluate import linear_probe, scoring
from byol_core.evaluate.features import Features, classifier_accuracy, embed_data
from byol_core.evaluate.linear_probe import LinearProbe
from byol_core.images.digits import write_digits
from byol_core.images.image_set import scan
from byol_core.pretrained import untrained_backbone
from byol_core.runtime import Runtime
from byol_core.views.pixels import load_images
from byol_core.views.recipes import digits_recipes

TOLERANCE = 0.02  # of accuracy: 7 of 360 digits; one probe is regularised and the other stops early


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


def test_a_run_on_a_large_set_is_measured_by_sgd_unless_a_classifier_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    data, held_out = (load_images(scan(folder), "device", torch.device("cpu"), lambda line: None)[0]
                      for folder in write_digits(tmp_path / "digits"))
    fitted: list[str] = []
    monkeypatch.setattr(scoring, "fit_classifier", lambda x, y, classifier: fitted.append(type(classifier).__name__))
    monkeypatch.setattr(scoring, "accuracy_of", lambda *sets: 0.5)
    monkeypatch.setattr(scoring, "unconverged", lambda classifier: None)
    monkeypatch.setattr(scoring, "FEW_LABELS", ())
    for limit, classifier in ((10**9, None), (10, None), (10, GaussianNB())):
        monkeypatch.setattr(linear_probe, "SKLEARN_UP_TO", limit)
        scoring.Scorer(data, held_out, digits_recipes()[0], Runtime("cpu"), 0, classifier).measure(torch.nn.Flatten())
    assert fitted == ["NoneType", "LinearProbe", "GaussianNB"]
