"""Frozen features: embeddings, weighted kNN, any scikit-learn classifier, and accuracies on a few labels."""

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from sklearn.base import BaseEstimator, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # which scikit-learn brings
from torch import Tensor, nn

from byol_core.runtime import Runtime
from byol_core.system.console import printable
from byol_core.views.pixels import ImageData, plain_batches
from byol_core.views.recipes import ViewRecipe

NEIGHBOURS, TEMPERATURE = 20, 0.1
HELD_OUT = 0.2
DRAWS = 10  # of the labelled images, for accuracies on a few labels per class


class Classifier(Protocol):
    """A scikit-learn classifier."""

    def fit(self, features: np.ndarray, labels: np.ndarray) -> object: ...
    def predict(self, features: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Features:
    """Embeddings (n, d) float32 and labels (n,) int64, both on the CPU."""

    x: Tensor
    y: Tensor

    def at(self, rows: Sequence[int] | np.ndarray) -> "Features":
        index = torch.as_tensor(np.asarray(rows))
        return Features(self.x[index], self.y[index])


def embed(backbone: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]], runtime: Runtime | None = None) -> Tensor:
    """The features of every image, in order: (n, d) float32 on the CPU, from `backbone` in eval mode without gradients.

    batches: image tensors (b, C, S, S), or sequences that begin with one, such as a DataLoader's (images, labels).
    The backbone's mode is restored.
    Raises: ValueError when there are no images or a feature is not finite, naming the first row.
    """
    runtime = runtime or Runtime(next(backbone.parameters()).device)
    images = (batch if isinstance(batch, Tensor) else batch[0] for batch in batches)
    return _joined([_features(backbone, batch, runtime) for batch in images], "embed: ", "row {}".format)


def embed_batches(backbone: nn.Module, data: ImageData, recipe: ViewRecipe, indices: Tensor, runtime: Runtime,
                  workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices (b,), features (b, d) float32 on the CPU) of those images that could be read, batch by batch, in order."""
    for found, images in plain_batches(data, recipe, indices, workers):
        yield found, _features(backbone, images, runtime)


def embed_data(backbone: nn.Module, data: ImageData, recipe: ViewRecipe, indices: Tensor, runtime: Runtime,
               workers: int = 0) -> tuple[Tensor, Tensor]:
    """(indices, features) of those images that could be read.

    Raises: ValueError when there are none or a feature is not finite, naming the first file.
    """
    rows, parts = [], []
    for found, features in embed_batches(backbone, data, recipe, indices, runtime, workers):
        rows.append(found)
        parts.append(features)
    indices = torch.cat(rows or [indices[:0]])
    return indices, _joined(parts, "", lambda row: printable(data.files.name(int(indices[row]))))


def _features(backbone: nn.Module, images: Tensor, runtime: Runtime) -> Tensor:
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad(), runtime.autocast():
            return backbone(runtime.place(images)).flatten(1).float().cpu()
    finally:
        backbone.train(was_training)


def _joined(parts: list[Tensor], prefix: str, name: Callable[[int], str]) -> Tensor:
    if not parts:
        raise ValueError(f"{prefix}there are no images")
    features = torch.cat(parts)
    bad = (~torch.isfinite(features).all(1)).nonzero().flatten()
    if len(bad):
        raise ValueError(f"{prefix}{len(bad)} of {len(features)} embeddings are not finite (first: {name(int(bad[0]))})")
    return features


def split(features: Features, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """(rows to fit on, rows to measure on): a fifth of every class held out; classes of one image are left out.

    Raises: ValueError when fewer than two classes can be split.
    """
    counts = torch.bincount(features.y)
    rows = (counts[features.y] >= 2).nonzero().flatten().numpy()
    labels = features.y[rows].numpy()
    classes = len(np.unique(labels))
    if classes < 2:
        raise ValueError("measuring needs at least 2 classes of 2 images")
    held_out = max(round(HELD_OUT * len(rows)), classes)
    fit, test = train_test_split(rows, test_size=held_out, stratify=labels, random_state=seed)
    return np.sort(fit), np.sort(test)


def knn_accuracy(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor,
                 k: int = NEIGHBOURS, temperature: float = TEMPERATURE) -> float:
    """Accuracy in [0, 1] of k neighbours by cosine, each voting with weight exp(cos / temperature).

    Features (n, d) of any floating dtype and device; k is reduced to n when there are fewer.
    Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4.
    """
    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances**2 / 2 - 1) / temperature)  # |a - b|^2 = 2 - 2 cos; the constant avoids overflow

    knn = KNeighborsClassifier(min(k, len(train_features)), weights=weights, algorithm="brute")
    knn.fit(_unit(train_features), _array(train_labels))
    return float(np.mean(knn.predict(_unit(test_features)) == _array(test_labels)))


def fit_classifier(features: Tensor, labels: Tensor, classifier: Classifier | None = None) -> Classifier:
    """`classifier`, or logistic regression on standardised features, fitted to frozen embeddings.

    None is LogisticRegression(max_iter=10000, random_state=42) behind a StandardScaler.
    Raises: TypeError when the classifier has no fit or predict; ValueError for fewer than two classes.
    """
    if classifier is None:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10000, random_state=42))
    if not (callable(getattr(classifier, "fit", None)) and callable(getattr(classifier, "predict", None))):
        raise TypeError(f"classifier needs fit and predict, got {type(classifier).__name__}")
    if len(torch.unique(labels)) < 2:
        raise ValueError("a classifier needs at least 2 classes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(_array(features), _array(labels))
    return classifier


def classifier_accuracy(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor,
                        classifier: Classifier | None = None) -> float:
    """Accuracy in [0, 1] on the test features of `fit_classifier` on the training features."""
    return accuracy_of(fit_classifier(train_features, train_labels, classifier), test_features, test_labels)


def accuracy_of(fitted: Classifier, features: Tensor, labels: Tensor) -> float:
    return float(np.mean(fitted.predict(_array(features)) == _array(labels)))


def few_label_accuracy(train: Features, test: Features, per_class: int, draws: int = DRAWS, seed: int = 0) -> float:
    """Mean accuracy over random draws of a linear probe that sees `per_class` labels of every class.

    Features are centred and divided by one number, so that their variance is 1 on average over all training images,
    which needs no label. (Dimension by dimension, a handful of labels would drown in what hardly varies: raw pixels
    lose 3 points by it.)
    """
    centre, scale = train.x.mean(0), train.x.std(0).square().mean().sqrt().clamp_min(1e-12)
    x_train, x_test = _array((train.x - centre) / scale), _array((test.x - centre) / scale)
    labels, generator, accuracies = _array(train.y), np.random.default_rng(seed), []
    with threadpool_limits(1, user_api="blas"):  # on so few rows threads wait for each other for longer than they compute
        for _ in range(draws):
            rows = np.concatenate([generator.choice(np.flatnonzero(labels == c), per_class, replace=False)
                                   for c in np.unique(labels)])
            probe = LogisticRegression(max_iter=10000, random_state=42).fit(x_train[rows], labels[rows])
            accuracies.append(np.mean(probe.predict(x_test) == _array(test.y)))
    return float(np.mean(accuracies))


def load_classifier(name: str) -> Classifier | None:
    """The classifier that --classifier names: logistic (None), knn, or the dotted name of a scikit-learn class.

    Its random_state, where it has one, is 42, so that two runs agree.
    Raises: ValueError when there is no such class or it is no classifier.
    """
    if name == "logistic":
        return None
    if name == "knn":
        return make_pipeline(StandardScaler(), KNeighborsClassifier(NEIGHBOURS))
    module, _, attribute = name.rpartition(".")
    try:
        classifier = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--classifier {name}: {error} - use logistic, knn or a dotted name such as "
                         "sklearn.svm.LinearSVC") from error
    if not (isinstance(classifier, BaseEstimator) and is_classifier(classifier)):
        raise ValueError(f"--classifier {name} is no classifier of scikit-learn's - use logistic, knn or a dotted name such "
                         "as sklearn.svm.LinearSVC")
    if classifier.get_params().get("random_state", 42) is None:
        classifier.set_params(random_state=42)
    return classifier


def unconverged(classifier: Classifier) -> str | None:
    """A remark when the fitted classifier, or the last step of a fitted pipeline, used up all its iterations; else None."""
    last = getattr(classifier, "steps", [("", classifier)])[-1][1]
    used, allowed = getattr(last, "n_iter_", None), getattr(last, "max_iter", None)
    if used is None or allowed is None or np.max(used) < allowed:
        return None
    return f"{type(last).__name__} did not converge within max_iter={allowed}; more may change its accuracy"


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy() if not values.is_floating_point() else values.detach().float().cpu().numpy()


def _unit(features: Tensor) -> np.ndarray:
    return nn.functional.normalize(features.detach().float().cpu(), dim=1).numpy()
