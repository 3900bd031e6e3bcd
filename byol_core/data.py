"""The images of a run: which of them can be read, where their pixels are held, and plain batches of them."""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from byol_core.folder import BadImageError, ImageSet, decode, decode_all, printable, typical_size
from byol_core.plan import Facts
from byol_core.runtime import usable_cpus
from byol_core.views import ViewRecipe, normalise, plain_view

BAD_LIMIT = 0.1  # share of the files; with more the folder is not what its owner thinks
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

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "report": None}  # workers report nothing; a console cannot be sent to them

    def add(self, index: int, reason: str) -> None:
        if index in self.reasons:
            return
        self.reasons[index] = reason
        self.report(f"skipped {printable(self.files.name(index))}: {printable(reason)}")
        if len(self.reasons) > BAD_LIMIT * len(self.files):
            raise TooManyBadFilesError(
                f"{len(self.reasons)} of {len(self.files)} images cannot be read, more than {BAD_LIMIT:.0%} "
                f"(the last: {printable(self.files.name(index))}: {printable(reason)}) - all of them are named above",
                self.listing())

    def listing(self) -> str:
        return "".join(f"{printable(self.files.name(index))}\t{printable(reason)}\n"
                       for index, reason in sorted(self.reasons.items()))


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

    def image(self, index: int) -> Image.Image:
        """Image `index` as RGB. Raises: BadImageError."""
        if index in self.bad.reasons:
            raise BadImageError(self.bad.reasons[index])
        if self.pixels is None:
            return decode(self.files.path(index))
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).cpu().numpy())


def look_at(files: ImageSet) -> Facts:
    """What a plan needs to know of the images, from a few of their headers."""
    height, width, same_size = typical_size(files)
    return Facts(len(files), min(height, width), same_size)


def load_images(files: ImageSet, where: str, device: torch.device, report: Callable[[str], None]) -> tuple[ImageData, str]:
    """(the images, where views are made and why). where: "auto", "device" (decode all now) or "cpu" (decode as needed).

    Raises: ValueError when `where` is "device" and the images do not allow it; TooManyBadFilesError.
    """
    bad = BadFiles(files, report)
    if where == "cpu":
        return ImageData(files, bad), "cpu (as asked)"
    height, width, same = typical_size(files)
    needed = len(files) * 3 * height * width
    if same and needed <= MEMORY_BUDGET:
        pixels = decode_all(files, bad.add)
        if pixels is not None:
            return ImageData(files, bad, pixels.to(device)), f"device ({len(files)} images of {width}x{height} in memory)"
        same = False
    reason = (f"{needed / 1e9:.1f} GB of images, over the budget of {MEMORY_BUDGET / 1e9:.1f} GB" if same
              else "images of different sizes")
    if where == "device":
        raise ValueError(f"--views device needs images of one size that fit in memory: {reason} - use --views cpu")
    return ImageData(files, bad), f"cpu ({reason})"


def ignore_signals(worker: int) -> None:
    """Signals sent to the whole process group are the main process's to answer; it then shuts its workers down."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


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
    loader = DataLoader(_PlainDataset(data, recipe, indices), batch_size=batch_size, num_workers=workers,
                        collate_fn=_collate_plain, worker_init_fn=ignore_signals)
    for found, images, failures in loader:
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
    images = torch.stack([image for _, image in good]) if good else torch.empty(0)
    return torch.tensor([index for index, _ in good], dtype=torch.int64), images, failures
