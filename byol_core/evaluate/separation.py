"""How well features tell images apart, without labels: the scores by which an unlabelled run is judged."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from byol_core.evaluate.features import embed
from byol_core.evaluate.scoring import Scores, some_indices
from byol_core.runtime import Runtime
from byol_core.system.seeds import seed_from
from byol_core.views.batches import DeviceBatches, Order, WorkerBatches

SAMPLE, PAIRS = 256, 4  # images, and pairs of views of each: more tell little more
AT_ONCE = 16  # images; as many of the sample as do not fill a batch are left out
RIDGE = 1e-4  # keeps the covariance within images invertible where there are fewer views than dimensions


def separation(features: Tensor, ridge: float = RIDGE) -> Tensor:
    """log det(W + B + ridge) - log det(W + ridge): minus the log of Wilks' lambda, each image a class, its views the members.

    W is the covariance of the l2-normalised features within images, B that of the images' means: the score grows where
    views of one image lie close together and different images far apart, in many directions.

    features: (images, views, D) floating, 2 of each at least. ridge: added to the diagonal. Returns: () float64, 0 when all
    images are alike.
    Raises: ValueError when features is not such a tensor.
    """
    _check("separation", features)
    images, views, dimensions = features.shape
    rows = nn.functional.normalize(features.double(), dim=2)
    means = rows.mean(1)
    inside = (rows - means[:, None]).flatten(0, 1)
    between = means - means.mean(0)
    within = inside.T @ inside / (images * (views - 1))
    within += ridge * torch.eye(dimensions, dtype=within.dtype, device=within.device)
    return torch.logdet(within + between.T @ between / (images - 1)) - torch.logdet(within)


def retrieval(features: Tensor) -> Tensor:
    """The share of views whose nearest one among another view of every image is of the same image, by cosine.

    Features are centred first: those of a random network all point the same way. An accuracy in [0, 1]; by chance it would be
    one in as many as there are images.

    features: (images, views, D) floating, 2 of each at least; views 1 and 2 are matched, 3 and 4, and so on, an odd one is
    left out. Returns: () float64.
    Raises: ValueError when features is not such a tensor.
    """
    _check("retrieval", features)
    rows = features.double()
    rows = nn.functional.normalize(rows - rows.mean((0, 1)), dim=2)
    own = torch.arange(len(rows), device=rows.device)
    found = [(rows[:, view] @ rows[:, view + 1].T).argmax(1) == own for view in range(0, rows.shape[1] - 1, 2)]
    return torch.stack(found).double().mean()


def _check(function: str, features: Tensor) -> None:
    if features.ndim != 3 or features.shape[0] < 2 or features.shape[1] < 2 or not features.is_floating_point():
        raise ValueError(f"{function}: features must be floating (images, views, D) with 2 images and 2 views at least, got "
                         f"{tuple(features.shape)} of {features.dtype}")


@dataclass(frozen=True)
class SampleOrder(Order):
    """The same few images in every epoch; those that do not fill a batch are left out. Another stands in for a bad one."""

    def __len__(self) -> int:
        return len(self.epoch(0))

    def epoch(self, epoch: int) -> Tensor:
        chosen = some_indices(self.images, SAMPLE)
        return chosen[:len(chosen) // self.batch_size * self.batch_size].view(-1, self.batch_size)


class SeparationScorer:
    """Measures backbones on a fixed sample of the run's own images, in views that are the same every time.

    new_batches: makes batches of two views from an order. order: of the run; its images, batch size and seed are used.
    """

    chosen_by = "separation"
    measured_on = f"at most {SAMPLE} of the images, each in {2 * PAIRS} views"

    def __init__(self, new_batches: Callable[[Order], DeviceBatches | WorkerBatches], order: Order, runtime: Runtime) -> None:
        self.new_batches, self.runtime = new_batches, runtime
        self.measured_images: int | None = None  # on how many the scores rest, once there are any
        self.order = SampleOrder(order.images, min(order.batch_size, AT_ONCE), seed=seed_from(order.seed, "separation"))

    def quick(self, backbone: nn.Module) -> float:
        """`separation` of the backbone's features. Raises: ValueError when one is not finite."""
        return float(separation(self._features(backbone)))

    def measure(self, backbone: nn.Module) -> Scores:
        """Both scores. Raises: ValueError when a feature is not finite."""
        features = self._features(backbone)
        self.measured_images = len(features)
        return {"separation": float(separation(features)), "retrieval": float(retrieval(features))}

    def _features(self, backbone: nn.Module) -> Tensor:
        """(images, views, D) of the sample."""
        batches = self.new_batches(self.order)
        try:
            pairs = [embed(backbone, map(torch.cat, batches.epoch(pair)), self.runtime) for pair in range(PAIRS)]
        finally:
            batches.close()
        views = [rows.unflatten(0, (-1, 2, self.order.batch_size)).transpose(1, 2).flatten(0, 1) for rows in pairs]
        return torch.cat(views, dim=1)
