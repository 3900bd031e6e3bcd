"""The images of a run: which of them can be read, where their pixels are held, and plain batches of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from byol_core.images.decoding import BadImageError, decode
from byol_core.images.image_set import ImageSet
from byol_core.system.command import usable_cpus
from byol_core.system.console import printable
from byol_core.views.recipes import ViewRecipe, normalise, plain_view
from byol_core.views.workers import batches_from, new_loader, shared

BAD_LIMIT = 0.1  # share of the files; with more the folder is not what its owner thinks
BLOCK_BYTES = 2**20  # of images that a worker hands over together: each hand-over costs about as much as decoding two files
DECODED_ALONE = 4_000  # images below which starting workers takes longer than decoding
MEMORY_BUDGET = 2**31  # bytes of decoded images held at once: 700,000 images of 32 pixels

Failure = tuple[int, str]  # index of a file that could not be decoded, and why


class TooManyBadFilesError(RuntimeError):
    """More of the image files are unusable than a run should pass over. listing: which, and why."""

    def __init__(self, message: str, listing: str = "") -> None:
        super().__init__(message)
        self.listing = listing


@dataclass
class BadFiles:
    """The files that could not be decoded, by index: each reported once, and too many of them are an error."""

    files: ImageSet
    report: Callable[[str], None]
    reasons: dict[int, str] = field(default_factory=dict)
    limit: float = BAD_LIMIT

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "report": None}  # workers report nothing; a console cannot be sent to them

    def add(self, index: int, reason: str) -> None:
        if index in self.reasons:
            return
        self.reasons[index] = reason
        self.report(f"skipped {printable(self.files.name(index))}: {printable(reason)}")
        if len(self.reasons) > self.limit * len(self.files):
            self.give_up(len(self.files))

    def restore(self, reasons: dict[int, str]) -> None:
        """Those that were reported before the run was stopped."""
        self.reasons.update(reasons)

    def enforce_limit(self, tried: int, bad: int) -> None:
        """Allow no more than a run does, from now on. Raises: TooManyBadFilesError if so many of those tried are bad."""
        self.limit = BAD_LIMIT
        if bad > self.limit * tried:
            self.give_up(tried)

    def give_up(self, tried: int) -> NoReturn:
        """Raises: TooManyBadFilesError. tried: images among which they are."""
        some = "; ".join(self._lines(": ")[:3])
        raise TooManyBadFilesError(
            f"{len(self.reasons)} of {tried} images cannot be read, more than {BAD_LIMIT:.0%} ({some}"
            f"{'; ...' if len(self.reasons) > 3 else ''}) - repair them, or take them away", self.listing())

    def listing(self, place: str = "") -> str:
        """A line per file: its name, below `place`, and why it was skipped."""
        return "".join(f"{line}\n" for line in self._lines("\t", place))

    def _lines(self, between: str, place: str = "") -> list[str]:
        return [f"{printable(place + self.files.name(index))}{between}{printable(reason)}"
                for index, reason in sorted(self.reasons.items())]


@dataclass
class ImageData:
    """The images of a run: their files, and their pixels where the whole set is held in memory.

    pixels: (N, 3, H, W) uint8 on the device that makes the views, or None.
    """

    files: ImageSet
    bad: BadFiles
    pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int, reduce: int = 1) -> Image.Image:
        """Image `index` as RGB; reduce: of a file, as `decode` takes it. Raises: BadImageError."""
        if index in self.bad.reasons:
            raise BadImageError(self.bad.reasons[index])
        if self.pixels is None:
            return decode(self.files.source(index), reduce)
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).cpu().numpy())

    def try_some(self, most: int) -> tuple[int, int]:
        """Decode up to `most` images, spread evenly over the set: (how many were tried, how many of them are bad)."""
        if self.pixels is not None:  # all of them were
            return len(self), len(self.bad.reasons)
        tried = [number * len(self) // min(most, len(self)) for number in range(min(most, len(self)))]
        for index in tried:
            try:
                self.image(index)
            except BadImageError as error:
                self.bad.add(index, str(error))
        return len(tried), sum(index in self.bad.reasons for index in tried)


@dataclass(frozen=True)
class Facts:
    """What a plan needs to know of the data. side: the shorter side of a typical image, in pixels."""

    images: int
    side: int


def usual_size(facts: Facts) -> int:
    """Native size for small images, else 128 or 224: the sizes of published results."""
    if facts.side <= 96:
        return max(facts.side, 8)
    return 128 if facts.side <= 160 else 224


def look_at(files: ImageSet) -> Facts:
    """What a plan needs to know of the images, from a few of their headers."""
    headers = files.headers
    return Facts(len(files), min(headers.height, headers.width))


def load_images(files: ImageSet, where: str, device: torch.device, report: Callable[[str], None],
                workers: int = 0, bad_limit: float = BAD_LIMIT) -> tuple[ImageData, str]:
    """(the images, where views are made and why). where: "cpu" (decode as needed); "auto" and "device" mean the same here:
    decode all now where they are of one size and fit in memory.

    workers: processes that may be started to decode. bad_limit: the share of bad files that is too much.
    Raises: ValueError when none can be opened; TooManyBadFilesError.
    """
    bad = BadFiles(files, report, limit=bad_limit)
    if where == "cpu":
        return ImageData(files, bad), "cpu (as asked)"
    height, width, same, _ = files.headers
    needed = len(files) * 3 * height * width
    if same and needed <= MEMORY_BUDGET:
        pixels = decode_all(files, bad.add, workers, max(1, BLOCK_BYTES // (3 * height * width)))
        if pixels is not None:
            return ImageData(files, bad, pixels.to(device)), f"device ({len(files)} images of {width}x{height} in memory)"
        same = False
    reason = (f"{needed / 1e9:.1f} GB of images, over the budget of {MEMORY_BUDGET / 1e9:.1f} GB" if same
              else "images of different sizes")
    return ImageData(files, bad), f"worker crops, finished on {device} ({reason})"


def decode_all(files: ImageSet, on_bad: Callable[[int, str], None], workers: int = 0, block: int = 32) -> Tensor | None:
    """Every image of a same-sized set as one uint8 tensor (N, 3, H, W), zeros for bad ones; None when sizes differ.

    block: images that a worker hands over together. The same, and bad ones in the same order, whatever `workers` and
    `block` are.
    """
    pixels: Tensor | None = None
    loader = new_loader(_PixelDataset(files, block), workers if len(files) >= DECODED_ALONE else 0, batch_size=None,
                        generator=torch.Generator())
    for indices, images, failures in batches_from(loader):
        for index, reason in failures:
            on_bad(index, reason)
        if pixels is None and len(images):
            pixels = torch.zeros(len(files), *images.shape[1:], dtype=torch.uint8)
        if len(images) != len(indices) or pixels is not None and len(images) and pixels.shape[1:] != images.shape[1:]:
            return None
        if pixels is not None:
            pixels.numpy()[indices.numpy()] = images.numpy()  # torch would wake all its threads for each of these small blocks
    return pixels


class _PixelDataset(Dataset[tuple[Tensor, Tensor, list[Failure]]]):
    """Images by the block: (their indices, (n, 3, H, W) uint8, those that could not be decoded); n is 0 where sizes differ."""

    def __init__(self, files: ImageSet, block: int) -> None:
        self.files = files
        self.block = block

    def __len__(self) -> int:
        return -(-len(self.files) // self.block)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, list[Failure]]:
        images: dict[int, np.ndarray] = {}  # (H, W, 3)
        failures: list[Failure] = []
        for index in range(number * self.block, min((number + 1) * self.block, len(self.files))):
            try:
                images[index] = np.array(decode(self.files.source(index)))
            except BadImageError as error:
                failures.append((index, str(error)))
        same = len({image.shape for image in images.values()}) == 1
        pixels = np.stack(list(images.values())) if same else np.empty((0, 0, 0, 3), np.uint8)
        return torch.tensor(list(images), dtype=torch.int64), shared(torch.from_numpy(pixels)).permute(0, 3, 1, 2), failures


def choose_workers(asked: int | None, processes: int = 1) -> int:
    """Worker processes for decoding: as asked, or one per usable CPU, at most 8, shared by the processes of this machine."""
    return max(min(8, usable_cpus() // processes), 1) if asked is None else asked


def plain_batches(data: ImageData, recipe: ViewRecipe, indices: Tensor, workers: int = 0,
                  batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices, images) of the images asked for, in order, unaugmented and normalised, (b, 3, S, S); bad ones left out."""
    if data.pixels is not None and tuple(data.pixels.shape[2:]) == (recipe.size, recipe.size):
        good = indices[[index not in data.bad.reasons for index in indices.tolist()]]
        for part in good.split(batch_size):
            yield part, normalise(data.pixels[part.to(data.pixels.device)].float() / 255, recipe)
        return
    if data.pixels is not None and data.pixels.device.type != "cpu":
        data = replace(data, pixels=data.pixels.cpu())  # forked processes have no GPU
    loader = new_loader(_PlainDataset(data, recipe, indices), workers, batch_size=batch_size, collate_fn=_collate_plain)
    for found, images, failures in batches_from(loader):
        for index, reason in failures:
            data.bad.add(index, reason)
        if len(found):
            yield found, images


class _PlainDataset(Dataset[tuple[int, "Tensor | str"]]):
    def __init__(self, data: ImageData, recipe: ViewRecipe, indices: Tensor) -> None:
        self.data = data
        self.view = plain_view(recipe)
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> "tuple[int, Tensor | str]":
        index = int(self.indices[row])
        try:
            return index, self.view(self.data.image(index))
        except BadImageError as error:
            return index, str(error)


def _collate_plain(samples: "Sequence[tuple[int, Tensor | str]]") -> tuple[Tensor, Tensor, list[Failure]]:
    good = [(index, image) for index, image in samples if isinstance(image, Tensor)]
    failures = [(index, reason) for index, reason in samples if isinstance(reason, str)]
    images = shared(torch.stack([image for _, image in good])) if good else torch.empty(0)
    return torch.tensor([index for index, _ in good], dtype=torch.int64), images, failures
