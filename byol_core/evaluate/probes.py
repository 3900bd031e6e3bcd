"""Accuracies of frozen features: weighted kNN, any scikit-learn classifier, few labels, and the published linear protocol."""

import importlib
import warnings
from typing import Protocol

import numpy as np
import torch
from sklearn.base import BaseEstimator, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # which scikit-learn brings
from torch import Tensor, nn

from byol_core.evaluate.features import Features

NEIGHBOURS, TEMPERATURE = 20, 0.1
DRAWS = 10  # of the labelled images, for accuracies on a few labels per class
MOMENTUM = 0.9  # Nesterov's
SKLEARN_UP_TO = 500_000_000  # images x dimensions x classes: 100,000 x 512 x 10, about a minute on one core


class Classifier(Protocol):
    """A scikit-learn classifier."""

    def fit(self, features: np.ndarray, labels: np.ndarray) -> object: ...
    def predict(self, features: np.ndarray) -> np.ndarray: ...


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
    fitted = fit_classifier(train_features, train_labels, classifier)
    return float(np.mean(fitted.predict(_array(test_features)) == _array(test_labels)))


def few_label_accuracy(train: Features, test: Features, per_class: int) -> float:
    """Mean accuracy over random draws of a linear probe that sees `per_class` labels of every class.

    Features are centred and divided by one number, so that their variance is 1 on average over all training images,
    which needs no label. (Dimension by dimension, a handful of labels would drown in what hardly varies: raw pixels
    lose 3 points by it.)
    """
    centre, scale = train.x.mean(0), train.x.std(0).square().mean().sqrt().clamp_min(1e-12)
    x_train, x_test = _array((train.x - centre) / scale), _array((test.x - centre) / scale)
    labels, generator, accuracies = _array(train.y), np.random.default_rng(0), []
    with threadpool_limits(1, user_api="blas"):  # on so few rows threads wait for each other for longer than they compute
        for _ in range(DRAWS):
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


def too_large_for_sklearn(features: Tensor, classes: int) -> bool:
    """Whether logistic regression by scikit-learn on features (n, d) would take longer than it tells."""
    return features.numel() * classes > SKLEARN_UP_TO


class LinearProbe:
    """Softmax regression by SGD: Nesterov momentum 0.9, no weight decay, learning rate by a cosine from `lr` to 0.

    A classifier like scikit-learn's: `fit`, then `predict`. Features are centred and divided by one number so that rows
    have a mean squared length of 1, which makes `lr` mean the same for every network and every number of dimensions.

    epochs: passes over the features, at least 1. batch_size: rows per step, at most all of them. lr: the peak, above 0,
    not scaled by the batch. seed: of the order; the weights start at 0. device: where the layer is trained; the features
    stay where they are and follow batch by batch.
    Raises: ValueError naming what is out of range.
    Source: the BYOL paper, appendix C.1 (SGD with Nesterov momentum, 80 epochs, batch 1024, no weight decay). Differences:
    features are those of one plain view of each image, not of a new random crop in every epoch.
    """

    def __init__(self, epochs: int = 80, batch_size: int = 1024, lr: float = 10.0, seed: int = 0,
                 device: torch.device | str = "cpu") -> None:
        if epochs < 1 or batch_size < 1 or not 0 < lr < float("inf"):
            raise ValueError(f"LinearProbe: epochs={epochs}, batch_size={batch_size}, lr={lr}; "
                             "give whole numbers from 1 and a finite rate above 0")
        self.epochs, self.batch_size, self.lr, self.seed, self.device = epochs, batch_size, lr, seed, torch.device(device)

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "LinearProbe":
        """features: (n, d) float. labels: (n,), of any sortable kind, at least 2 classes."""
        self.classes_, targets = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("LinearProbe: a classifier needs at least 2 classes")
        x, y = torch.as_tensor(features), torch.as_tensor(targets)
        self.centre = x.mean(0, dtype=torch.float64).float()
        self.scale = float((x - self.centre).square().sum(1).mean().sqrt().clamp_min(1e-12))
        self.layer = nn.Linear(x.shape[1], len(self.classes_), device=self.device)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        optimizer = torch.optim.SGD(self.layer.parameters(), self.lr, MOMENTUM, nesterov=True)
        batches = -(-len(x) // self.batch_size)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * batches)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(x), generator=generator).tensor_split(batches):
                loss = nn.functional.cross_entropy(self._logits(x[rows]), y[rows].to(self.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
        return self

    @torch.no_grad()
    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n,) labels of the kind that `fit` was given."""
        parts = torch.as_tensor(features).split(self.batch_size)
        return self.classes_[torch.cat([self._logits(part).argmax(1).cpu() for part in parts]).numpy()]

    def _logits(self, features: Tensor) -> Tensor:
        return self.layer(((features - self.centre) / self.scale).to(self.device))


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy() if not values.is_floating_point() else values.detach().float().cpu().numpy()


def _unit(features: Tensor) -> np.ndarray:
    return nn.functional.normalize(features.detach().float().cpu(), dim=1).numpy()
