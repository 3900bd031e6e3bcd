"""Features of a frozen backbone, and their split into images to fit on and images to measure on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from byol_core.runtime import Runtime
from byol_core.system.console import printable
from byol_core.views.pixels import ImageData, plain_batches
from byol_core.views.recipes import ViewRecipe

HELD_OUT = 0.2


class NonFiniteFeaturesError(ValueError):
    """A network whose weights have run away."""


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
        raise NonFiniteFeaturesError(
            f"{prefix}{len(bad)} of {len(features)} embeddings are not finite (first: {name(int(bad[0]))})")
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
