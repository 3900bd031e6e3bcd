"""The published linear protocol: one linear layer trained by SGD on frozen features, for sets too large for scikit-learn."""

import numpy as np
import torch
from torch import Tensor, nn

MOMENTUM = 0.9  # Nesterov's
SKLEARN_UP_TO = 500_000_000  # images x dimensions x classes: 100,000 x 512 x 10, about a minute on one core


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
