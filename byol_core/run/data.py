"""The images of a run, and what measures features on them or on those of --eval-data."""

import functools
import os
from collections.abc import Callable, Iterator

from torch import nn

from byol_core.evaluate.scoring import Scorer, Scores
from byol_core.evaluate.separation import SeparationScorer
from byol_core.images.image_set import ImageSet, scan
from byol_core.run.setup import Setup
from byol_core.system.files import write_text
from byol_core.views.batches import Order
from byol_core.views.pixels import BAD_LIMIT, ImageData, TooManyBadFilesError, load_images
from byol_core.views.sources import Batches, batches_of

Say = Callable[[str], None]
Loaded = tuple[ImageData, str]  # and where views are made, and why there


def load(setup: Setup, files: ImageSet, say: Say, views: str = "auto") -> Loaded:
    """The images of `files`, in memory where they fit. Raises: ValueError; TooManyBadFilesError, which bad_files.txt lists."""
    try:
        limit = 1.0 if setup.config.check else BAD_LIMIT  # a check counts them all
        return load_images(files, views, setup.runtime.device, say, setup.workers, limit)
    except TooManyBadFilesError as error:
        if setup.processes.first:
            write_text(setup.folder / "bad_files.txt", error.listing)
        raise


def order_of(setup: Setup, images: int) -> Order:
    """Which images form which batch of this process."""
    plan, processes = setup.plan, setup.processes
    return Order(images, plan.batch_size, plan.accum_steps, setup.config.seed, processes.rank, processes.world_size,
                 plan.updates_per_epoch)


def open_views(setup: Setup, images: ImageData, order: Order) -> Batches:
    return batches_of(images, setup.plan.views, order, setup.workers, setup.runtime.device, setup.config.views == "cpu")


class Measuring:
    """Scores of a backbone: accuracies on labelled images, or, where there are none, how well it tells images apart.

    eval_data: the images of --eval-data, where they are given.
    Raises: ValueError when --eval-data cannot be measured on.
    """

    def __init__(self, setup: Setup, images: ImageData, say: Say) -> None:
        self.setup, self.images, self.say = setup, images, say
        self.eval_data: ImageData | None = None
        self.scorer: Scorer | SeparationScorer | None = None  # None: nothing is measured
        if not setup.config.eval or not setup.processes.first:
            return
        if images.files.labels is None and setup.config.eval_data is None:
            self.do_without_labels()
            return
        fit, test = images, None
        if setup.config.eval_data is not None:
            self.eval_data = test = _load_eval_data(setup, images.files, say)
            if images.files.labels is None:  # then both the fitting and the measuring are done on parts of --eval-data
                fit, test = test, None
        self.scorer = Scorer(fit, test, setup.plan.plain, setup.runtime, setup.workers, setup.classifier, say)

    @property
    def measured_on(self) -> str | None:
        return None if self.scorer is None else self.scorer.measured_on

    @property
    def measured_images(self) -> int | None:
        """On how many accuracies rest, once there are any."""
        return None if self.scorer is None else self.scorer.measured_images

    def do_without_labels(self) -> None:
        self.scorer = SeparationScorer(lambda order: open_views(self.setup, self.images, order),
                                       order_of(self.setup, len(self.images)), self.setup.runtime)

    def measure(self, backbone: nn.Module) -> Scores | None:
        """None where nothing can be measured. Where the labels allow no accuracy it is done without them, from then on."""
        while self.scorer is not None:
            try:
                return self.scorer.measure(backbone)
            except ValueError as error:
                if isinstance(self.scorer, Scorer):
                    self.say(f"no accuracy: {error}")
                    self.do_without_labels()
                else:
                    self.say(f"nothing measured: {error}")
                    self.scorer = None
        return None


def _load_eval_data(setup: Setup, trained_on: ImageSet, say: Say) -> ImageData:
    """The images of --eval-data, which have labels, and a warning for what makes their accuracies mean less."""
    given = setup.config.eval_data
    assert given is not None
    files = scan(given, "--eval-data", leave_out=(setup.folder,))
    for remark in files.remarks:
        say(f"warning: --eval-data: {remark}")
    if files.labels is None:
        raise ValueError(f"--eval-data {given} has fewer than 2 class sub-folders, so there is nothing to measure")
    images, _ = load(setup, files, say)
    own, others = set(trained_on.classes), set(files.classes)
    if own and not own & others:
        raise ValueError(f"--eval-data {files.given} has no class folder of the same name as one in --data - measured on it, "
                         "every accuracy would be 0")
    if own and others - own:
        say(f"warning: images of {len(others - own)} classes that --data does not have count as wrong: "
            f"{', '.join(sorted(others - own)[:5])}")
    both = _in_both(files, trained_on) if trained_on.labels is not None else 0
    if both:
        say(f"warning: {both} of {len(files)} images of --eval-data are in --data, too: the probes are fitted on them, so the "
            "accuracies are too high")
    return images


def _in_both(files: ImageSet, others: ImageSet) -> int:
    """How many files of `others` are among `files`."""
    real_folder = functools.cache(os.path.realpath)

    def places(images: ImageSet) -> Iterator[tuple[str, str]]:
        return ((real_folder(path.parent), path.name) for path in map(images.path, range(len(images))))

    measured = set(places(files))
    return sum(place in measured for place in places(others))
