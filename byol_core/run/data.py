"""The images of a run, and what measures features on them or on those of --eval-data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from byol_core.evaluate.scoring import Scorer, Scores, class_remark, scan_labelled
from byol_core.evaluate.separation import SeparationScorer
from byol_core.images.duplicates import same_paths
from byol_core.images.image_set import ImageSet
from byol_core.run.setup import Setup
from byol_core.system.files import write_text
from byol_core.views.batches import Order, TimedBatches
from byol_core.views.pixels import BAD_LIMIT, ImageData, TooManyBadFilesError, load_images
from byol_core.views.sources import Batches, batches_of

Say = Callable[[str], None]
Loaded = tuple[ImageData, str]  # and where views are made, and why there


@dataclass(frozen=True)
class Data:
    """The images of a run, where their views are made and why, the views, the batches of them, what measures features."""

    images: ImageData
    views_reason: str
    views: Batches
    batches: TimedBatches
    measuring: "Measuring"


def open_data(setup: Setup, files: ImageSet, say: Say, loaded: Loaded | None = None) -> Data:
    """Raises: ValueError for images that cannot be trained or measured on. loaded: the images, if they are loaded already."""
    images, reason = loaded or load(setup, files, say, setup.config.views)
    images = replace(images, bad=replace(images.bad, report=say))  # also of those that another run has loaded
    plan, processes = setup.plan, setup.processes
    order = Order(len(images), plan.batch_size, plan.accum_steps, setup.config.seed, processes.rank, processes.world_size,
                  plan.updates_per_epoch)
    views_of = partial(batches_of, images, plan.views, workers=setup.workers, device=setup.runtime.device,
                       on_cpu=setup.config.views == "cpu")
    measuring = Measuring(setup, images, say, lambda: SeparationScorer(views_of, order, setup.runtime))
    views = views_of(order)
    return Data(images, reason, views, TimedBatches(views, setup.runtime.device), measuring)


def load(setup: Setup, files: ImageSet, say: Say, views: str = "auto") -> Loaded:
    """The images of `files`, in memory where they fit. Raises: ValueError; TooManyBadFilesError, which bad_files.txt lists."""
    try:
        limit = 1.0 if setup.config.check else BAD_LIMIT  # a check counts them all
        return load_images(files, views, setup.runtime.device, say, setup.workers, limit)
    except TooManyBadFilesError as error:
        if setup.processes.first:
            write_text(setup.folder / "bad_files.txt", error.listing)
        raise


class Measuring:
    """Scores of a backbone: accuracies on labelled images, or, where there are none, how well it tells images apart.

    without_labels: makes the scorer for images without labels. eval_data: the images of --eval-data, where they are given.
    Raises: ValueError when --eval-data cannot be measured on.
    """

    def __init__(self, setup: Setup, images: ImageData, say: Say, without_labels: Callable[[], SeparationScorer]) -> None:
        self.say, self.without_labels = say, without_labels
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
    def chosen_by(self) -> str | None:
        """The score that `quick` gives, and the best network is chosen by; None where nothing is measured."""
        return None if self.scorer is None else self.scorer.chosen_by

    def about(self) -> dict[str, str | int | None]:
        """For the summary: what is measured on, and, once there are accuracies, on how many images they rest."""
        return {name: getattr(self.scorer, name, None) for name in ("measured_on", "measured_images")}

    def do_without_labels(self) -> None:
        self.scorer = self.without_labels()

    def quick(self, backbone: nn.Module) -> float:
        """For measuring on the way. Raises: ValueError when a feature is not finite."""
        assert self.scorer is not None
        return self.scorer.quick(backbone)

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
    files = scan_labelled(given, "--eval-data", say, leave_out=(setup.folder,))
    remark, both = (None, 0) if trained_on.labels is None else (class_remark(trained_on, files), same_paths(files, trained_on))
    if remark is not None:
        say(f"warning: {remark}")
    if both:
        say(f"warning: {both} of {len(files)} images of --eval-data are in --data, too: the probes are fitted on them, so the "
            "accuracies are too high")
    return load(setup, files, say)[0]
