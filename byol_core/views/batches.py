"""Batches of two views: one order, one replacement rule, and two of the three sources of views (see `worker_crops`)."""

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from byol_core.images.decoding import BadImageError
from byol_core.system.seeds import seed_from
from byol_core.views.draw import draw
from byol_core.views.pixels import Failure, ImageData, TooManyBadFilesError
from byol_core.views.recipes import ViewRecipe, cpu_view
from byol_core.views.render import render_all
from byol_core.views.workers import batches_from, close, new_loader, shared

Views = tuple[Tensor, Tensor]  # two views of each image, (B, 3, S, S) each
Read = TypeVar("Read")


@dataclass(frozen=True)
class Order:
    """Which images form which batch: a pure function of (seed, epoch). Images that do not fill a batch sit that epoch out.

    updates: of an epoch, fewer than the images allow; None is as many as they do.
    """

    images: int
    batch_size: int
    accum_steps: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    updates: int | None = None

    def __len__(self) -> int:
        """Micro-batches per epoch and process."""
        return self._updates * self.accum_steps

    @property
    def _updates(self) -> int:
        filled = self.images // self.batch_size
        return filled if self.updates is None else min(self.updates, filled)

    def epoch(self, epoch: int) -> Tensor:
        """(micro-batches, micro-batch size) int64: the images of this process, in order."""
        generator = torch.Generator().manual_seed(seed_from(self.seed, "order", epoch))
        chosen = torch.randperm(self.images, generator=generator)[:self._updates * self.batch_size]
        micro_batch = self.batch_size // (self.accum_steps * self.world_size)
        return chosen.view(-1, self.world_size, micro_batch)[:, self.rank]


def replacement(seed: int, epoch: int, index: int, attempt: int, images: int) -> int:
    """The image that stands in for a bad one: a pure function of the place, so that nothing else shifts."""
    return seed_from(seed, "replacement", epoch, index, attempt) % images


def first_readable(read: Callable[[int], Read], seed: int, epoch: int, index: int, images: int) -> tuple[Read, list[Failure]]:
    """What `read` gives for the image, or for the stand-in that all paths take, and the files found bad on the way to it."""
    failures: list[Failure] = []
    source = index
    for attempt in range(1000):
        try:
            return read(source), failures
        except BadImageError as error:
            failures.append((source, str(error)))
        source = replacement(seed, epoch, index, attempt, images)
    raise TooManyBadFilesError("no readable image found in 1000 tries - the images may all be bad or gone")


class DeviceBatches:
    """Two views per image, made in batches on the device from images held there.

    len() is the number of micro-batches in an epoch; `epoch` yields them from any of them on.
    """

    def __init__(self, data: ImageData, recipes: tuple[ViewRecipe, ViewRecipe], order: Order) -> None:
        assert data.pixels is not None
        self.pixels = data.pixels
        self.bad = data.bad
        self.recipes = recipes
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Views]:
        height, width = self.pixels.shape[2:]
        for indices in self.order.epoch(epoch)[start:]:
            images = self.pixels[self._readable(epoch, indices).to(self.pixels.device, non_blocking=True)]
            params = [draw(recipe, self.order.seed, epoch, indices, view, height, width)
                      for view, recipe in enumerate(self.recipes)]
            view1, view2 = render_all((images, images), params, self.recipes)
            yield view1, view2

    def close(self) -> None:
        """There are no workers to stop."""

    def _readable(self, epoch: int, indices: Tensor) -> Tensor:
        if not self.bad.reasons:
            return indices
        return torch.tensor([first_readable(self._good, self.order.seed, epoch, index, len(self.pixels))[0]
                             for index in indices.tolist()])

    def _good(self, index: int) -> int:
        if index in self.bad.reasons:
            raise BadImageError(self.bad.reasons[index])
        return index


class WorkerBatches:
    """Two views per image, made one by one with torchvision in worker processes: the reference path.

    len() is the number of micro-batches in an epoch; `epoch` yields them from any of them on, whatever `workers` is.
    """

    def __init__(self, data: ImageData, recipes: tuple[ViewRecipe, ViewRecipe], order: Order, workers: int,
                 pin_memory: bool = False) -> None:
        self.order = order
        self.bad = data.bad
        self.sampler = _EpochSampler(order)
        self.loader = new_loader(self._dataset(data, recipes, order.seed), workers, batch_sampler=self.sampler,
                                 collate_fn=_collate, pin_memory=pin_memory, persistent_workers=workers > 0)

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Views]:
        self.sampler.place = epoch, start
        numbers = itertools.count(start)

        def made(batch: tuple[Tensor, Tensor, list[Failure]]) -> Views:
            view1, view2, failures = batch
            for index, reason in failures:
                self.bad.add(index, reason)
            return self._finished((view1, view2), epoch, next(numbers))

        return batches_from(self.loader, made)

    def _finished(self, views: Views, epoch: int, number: int) -> Views:
        """The views of micro-batch `number`, of what workers have made of them."""
        return views

    def _dataset(self, data: ImageData, recipes: tuple[ViewRecipe, ViewRecipe], seed: int) -> Dataset[Any]:
        return _ViewDataset(data, recipes, seed)

    def close(self) -> None:
        """Stop the workers; a further epoch starts new ones."""
        close(self.loader)


class _EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys; where to start is set before each pass."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.place = 0, 0  # epoch, first micro-batch

    def __len__(self) -> int:
        return len(self.order) - self.place[1]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self.place
        for indices in self.order.epoch(epoch)[start:]:
            yield [(epoch, index) for index in indices.tolist()]


class _ViewDataset(Dataset[tuple[Tensor, Tensor, list[Failure]]]):
    def __init__(self, data: ImageData, recipes: tuple[ViewRecipe, ViewRecipe], seed: int) -> None:
        self.data = data
        self.views = [cpu_view(recipe) for recipe in recipes]
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, list[Failure]]:
        epoch, index = key
        image, failures = first_readable(self.data.image, self.seed, epoch, index, len(self.data))
        views = []
        with _one_thread():
            for number, view in enumerate(self.views):
                torch.default_generator.manual_seed(seed_from(self.seed, "view", epoch, index, number))
                views.append(view(image))
        return views[0], views[1], failures


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker: the mean of a large image is summed in other parts by several threads, and so are its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _collate(samples: Sequence[tuple[Tensor, Tensor, list[Failure]]]) -> tuple[Tensor, Tensor, list[Failure]]:
    first, second, failures = zip(*samples)
    return shared(torch.stack(first)), shared(torch.stack(second)), list(itertools.chain(*failures))


class MadeAhead:
    """Called again and again, gives `views` one by one, then None; each batch is copied and made on the stream `aside` while
    the one before is trained on.

    One stream should do for a run: torch keeps freed memory per stream.
    """

    def __init__(self, views: Iterator[Views], aside: "torch.cuda.Stream") -> None:
        self.views, self.aside = views, aside
        self.consumer = torch.cuda.current_stream(aside.device)
        self.begun = False
        self.following: Views | None = None
        aside.wait_stream(self.consumer)  # what the views are made of may still be on its way

    def __call__(self) -> Views | None:
        current = self.following if self.begun else self._make()
        self.begun = True
        if current is not None:
            self.consumer.wait_stream(self.aside)  # for this batch; the next is queued only then
            for view in current:
                view.record_stream(self.consumer)  # or its memory would be used again while the consumer still reads it
            self.following = self._make()
        return current

    def _make(self) -> Views | None:
        with torch.cuda.stream(self.aside):
            made = next(self.views, None)
            return made and tuple(view.to(self.aside.device, non_blocking=True) for view in made)  # type: ignore[return-value]


class TimedBatches:
    """Batches, and the time that their consumer waits for them; made ahead where `device`, the consumer's, is a CUDA device.

    A CUDA device waits while it has none of the consumer's work to do, by its own clock: what the host spends on the next
    batch meanwhile costs nothing.
    """

    def __init__(self, batches: DeviceBatches | WorkerBatches, device: torch.device = torch.device("cpu")) -> None:
        self.batches = batches
        self.aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waits: deque[tuple[Any, Any]] = deque()  # from when to when

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Views]:
        views = self.batches.epoch(epoch, start)
        take = partial(next, views, None) if self.aside is None else MadeAhead(views, self.aside)
        while True:
            asked = self._now()
            try:
                batch = take()
            finally:
                self._waits.append((asked, self._now()))
            if batch is None:
                return
            yield batch

    def take_waited(self) -> float:
        """Seconds waited since the last call; on a CUDA device, those that it has got to by now."""
        seconds = 0.0
        while self._waits and (self.aside is None or self._waits[0][1].query()):
            asked, came = self._waits.popleft()
            seconds += came - asked if self.aside is None else asked.elapsed_time(came) / 1000
        return seconds

    def _now(self) -> "float | torch.cuda.Event":
        if self.aside is None:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.aside.device))
        return event
