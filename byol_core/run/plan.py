"""What a run will do, worked out from the options and the data before anything is trained; every choice has its reason."""

import math
from dataclasses import dataclass, replace

from byol_core.run.options import TrainConfig
from byol_core.schedules import scaled_lr
from byol_core.views.pixels import Facts, usual_size
from byol_core.views.recipes import ViewRecipe, digits_recipes, paper_recipes

SMALL_SET = 200_000  # images; below it the recipe follows published CIFAR settings, above it the paper's ImageNet ones
LARGEST_SCALED = 512  # images: without LARS, rates in proportion to the batch are published up to it
ENOUGH_UPDATES = 10_000  # updates of a run; with fewer a smaller batch is taken. A guess, as is RESNET_FROM
LARGEST_BATCH, SMALLEST_BATCH, AT_LEAST_EACH = 256, 64, 32  # of an update, and per process
CONV4_SIZE, CONV4_VIEW, CONV4_UP_TO = 48, 24, 96  # pixels at most: of a measured image, of a view, of images it is chosen for
CONV4_OF_OTHERS = 32  # pixels at most, with the other recipes: there views are as large as images, and larger ones are slow
RESNET_FROM = 1_000_000  # images of all updates together
MIN_SCALE = 0.2  # smallest share of an image's area in a view, of small sets
FAST_PREDICTOR = 10.0  # times the rate of the rest
SMALL_STEM_BELOW = 48  # pixels; there the ImageNet stem leaves a 1x1 final map
RESNETS = ("resnet", "resnext", "wide_resnet")
LARGEST_LR = 1e6  # per 256 images; beyond it numbers overflow before anything can be learned
# The paper's presets by epochs at batch 4096 (byol/configs/byol.py of the reference code): lr per 256, weight decay, tau.
PAPER_PRESETS = {40: (0.45, 1e-6, 0.97), 100: (0.45, 1e-6, 0.99), 300: (0.3, 1e-6, 0.99), 1000: (0.2, 1.5e-6, 0.996)}


@dataclass(frozen=True)
class Choice:
    """One choice of a plan. asked: by the user. shown: the value as a person reads it, where more is to be said of it."""

    name: str
    value: int | float | str | bool
    reason: str
    asked: bool = False
    shown: str = ""

    def __str__(self) -> str:
        return self.shown or (f"{self.value:.6g}" if isinstance(self.value, float) else str(self.value))


def as_asked(name: str, value: int | float | str | bool) -> Choice:
    return Choice(name, value, "as asked", asked=True)


@dataclass(frozen=True)
class Plan:
    """The resolved numbers of a run.

    image_size: edge in pixels of an image that is measured or embedded; view_size: of a random view, in training. lr: the
    peak rate after scaling by the batch. predictor_lr: the predictor's, as a multiple of it. micro_batch: images per process
    and backward pass.
    """

    arch: str
    image_size: int
    view_size: int
    small_stem: bool
    hidden_dim: int
    projection_dim: int
    batch_size: int
    micro_batch: int
    accum_steps: int
    epochs: int
    updates_per_epoch: int
    optimizer: str
    lr: float
    predictor_lr: float
    weight_decay: float
    warmup_epochs: float
    scheduler: str
    scheduler_interval: str
    tau_base: float
    tau_schedule: str
    views: tuple[ViewRecipe, ViewRecipe]
    choices: tuple[Choice, ...]

    @property
    def network(self) -> Choice:
        return next(choice for choice in self.choices if choice.name == "arch")

    @property
    def plain(self) -> ViewRecipe:
        """How an image is shown that is measured or embedded: `plain_view` and whoever agrees with it use no other fields."""
        return replace(self.views[0], size=self.image_size, blur_kernel=0)  # the kernel is of the views' size

    @property
    def total_updates(self) -> int:
        return self.updates_per_epoch * self.epochs


def half_life_tau(updates: int) -> float:
    """tau = 0.5 ** (1 / h), h = 3 % of the run's updates in [2, 173]: the target forgets its random start in any run.

    173 updates is the half-life of the paper's 1000-epoch preset (tau 0.996).
    """
    return 0.5 ** (1 / min(max(0.03 * updates, 2.0), 173.0))


def make_plan(config: TrainConfig, facts: Facts, world_size: int = 1, seen: int | None = None,
              network: Choice | None = None) -> Plan:
    """The plan for these options and this data; flags win over the recipe.

    seen: images of all updates together, in place of the epochs that the options name: epochs are then a little shorter than
    a pass over the images, so that a whole number of them comes close. network: the choice of `arch`, if it is made already.
    Raises: ValueError when the batch does not fit the images, the processes or the accumulation.
    """
    about = facts.images * config.epochs if seen is None else seen
    batch = _batch(facts.images, about, config, world_size) if config.batch_size is None else \
        as_asked("batch_size", config.batch_size)
    batch_size = int(batch.value)
    _check_batch(batch_size, config.accum_steps, world_size, facts.images)
    network = network or _arch(config, config.image_size or usual_size(facts), about)
    arch = str(network.value)
    edge = _edge(facts, arch, config.recipe) if config.image_size is None else as_asked("image_size", config.image_size)
    of_views = _view_size(config, arch, int(edge.value))
    size = int(of_views.value)
    epochs, updates = config.epochs, facts.images // batch_size
    if seen is not None:
        total = max(1, seen // batch_size)
        epochs = math.ceil(total / updates)
        updates = math.ceil(total / epochs)

    chosen = {
        "batch_size": batch,
        "arch": network,
        "image_size": edge,
        "view_size": of_views,
        "predictor_lr": Choice("predictor_lr", 1.0, "as the rest"),
        "small_stem": Choice("small_stem", size < SMALL_STEM_BELOW and arch.startswith(RESNETS),
                             f"3x3 stem for ResNets on views below {SMALL_STEM_BELOW} px"),
    }
    recipe = {"auto": _auto, "paper": _paper, "quadra": _quadra, "digits": _digits}[config.recipe]
    chosen |= {choice.name: choice for choice in recipe(facts, epochs, updates * epochs, batch_size)}
    asked = {name: getattr(config, name) for name in chosen if getattr(config, name, None) is not None}
    if asked.get("optimizer", chosen["optimizer"].value) != chosen["optimizer"].value:
        chosen |= {choice.name: choice for choice in _rates(str(asked["optimizer"]), epochs, batch_size)}
        chosen["predictor_lr"] = Choice("predictor_lr", 1.0, "as the rest")
    if asked.get("scheduler") == "plateau":
        chosen |= {"scheduler_interval": Choice("scheduler_interval", "epoch", "a plateau is of the epoch's loss"),
                   "warmup_epochs": Choice("warmup_epochs", 0.0, "a plateau schedule has none")}
    chosen |= {name: as_asked(name, value) for name, value in asked.items()}
    _check_rates(chosen, epochs)

    values = {name: choice.value for name, choice in chosen.items()}
    values["lr"] = scaled_lr(float(values["lr"]), batch_size)
    chosen["lr"] = replace(chosen["lr"], shown=f"{chosen['lr']} x {batch_size}/256 = {values['lr']:.6g}")
    views, least = _views(config.recipe, size), _min_scale(config, facts.images)
    views = views if least is None else with_min_scale(views, float(least.value))
    return Plan(
        **values,  # type: ignore[arg-type]
        micro_batch=batch_size // (config.accum_steps * world_size), accum_steps=config.accum_steps,
        epochs=epochs, updates_per_epoch=updates,
        views=views, choices=(*chosen.values(), *_choices_of_views(config.recipe, least, *views)),
    )


def _arch(config: TrainConfig, size: int, seen: int) -> Choice:
    """seen: images of all updates together."""
    if config.arch is not None:
        return as_asked("arch", config.arch)
    if config.recipe == "digits":
        return Choice("arch", "conv6", "a small network for tiny images")
    wants_resnet = config.init_from is not None or config.small_stem is not None
    if config.recipe == "auto" and not wants_resnet and size <= CONV4_UP_TO and seen < RESNET_FROM:
        return Choice("arch", "conv4", f"learns faster from images of up to {CONV4_UP_TO} pixels than a ResNet that would see "
                      f"fewer than {RESNET_FROM:,} of them")
    return Choice("arch", "resnet18", "the usual small backbone")


def _batch(images: int, seen: int, config: TrainConfig, world_size: int) -> Choice:
    """seen: images of all updates together."""
    if config.recipe == "digits":
        return Choice("batch_size", 64, "best on the sample")
    largest = LARGEST_BATCH if images < 4 else min(LARGEST_BATCH, 2 ** int(math.log2(images / 2)))
    batch, least = largest, max(SMALLEST_BATCH, AT_LEAST_EACH * world_size, 2 * config.accum_steps * world_size)
    while config.recipe == "auto" and batch // 2 >= least and seen < ENOUGH_UPDATES * batch:
        batch //= 2
    if batch < largest:
        return Choice("batch_size", batch, f"for {seen // batch:,} updates; in short runs more updates are worth more than a "
                      "larger batch")
    return Choice("batch_size", batch, "usual for one device" if batch == LARGEST_BATCH else
                  f"the largest power of two that {images} images fill twice")


def _check_batch(batch_size: int, accum_steps: int, world_size: int, images: int) -> None:
    if images < batch_size:
        raise ValueError(f"{images} images < --batch-size {batch_size} - use --batch-size {max(images, 2)} or less"
                         if images > 1 else "1 image is not enough - BYOL needs at least 2 images in a batch")
    parts = accum_steps * world_size
    if batch_size % parts:
        raise ValueError(f"--batch-size {batch_size} does not divide into {accum_steps} micro-batches on {world_size} "
                         f"processes - use a multiple of {parts}")
    if batch_size // parts < 2:
        raise ValueError(f"--batch-size {batch_size} leaves a batch of 1 per process and micro-batch, which batch norm "
                         f"cannot train - use {2 * parts} or more")


def _check_rates(chosen: dict[str, Choice], epochs: int) -> None:
    warmup = float(chosen["warmup_epochs"].value)
    if warmup > epochs > 0:
        raise ValueError(f"--warmup-epochs {warmup:g} is longer than the run - use --warmup-epochs {epochs} or less")
    if warmup and chosen["scheduler"].value == "plateau":
        raise ValueError("--warmup-epochs has no effect with --scheduler plateau - leave one of them out")
    if float(chosen["lr"].value) > LARGEST_LR:
        raise ValueError(f"--lr {chosen['lr'].value:g} is no learning rate - use {LARGEST_LR:g} or less")


def _edge(facts: Facts, arch: str, recipe: str) -> Choice:
    size, reason = usual_size(facts), f"images are about {facts.side} pixels"
    most, why = (CONV4_SIZE, "is worth most when they are shown at") if recipe == "auto" else (
        CONV4_OF_OTHERS, "learns more in the same time at")
    if arch == "conv4" and size > most:
        return Choice("image_size", most, f"{reason}; conv4 {why} {most}")
    return Choice("image_size", size, reason + ("" if size == facts.side else "; larger ones are shown at 128 or 224"))


def _view_size(config: TrainConfig, arch: str, image_size: int) -> Choice:
    if config.view_size is not None:
        return as_asked("view_size", config.view_size)
    # Above 64 pixels nothing was measured; the proportion is that of 24 to 64.
    smaller = max(8, int(image_size * 3 / 8), min(CONV4_VIEW, int(image_size * 3 / 4)))
    if config.recipe == "auto" and arch == "conv4" and smaller < image_size:
        return Choice("view_size", smaller, "more are seen in the same time, and the network gains by being shown larger "
                      "images than it is trained on")
    return Choice("view_size", image_size, "as the images")


def _digits(facts: Facts, epochs: int, total: int, batch_size: int) -> list[Choice]:
    return [Choice("optimizer", "adamw", "best on the sample"),
            Choice("lr", 8e-3 * min(1.0, 64 / batch_size), "2e-3 from batch 64 on: more in larger ones loses the features"),
            Choice("predictor_lr", 10.0, "a fast predictor keeps the rank of the features up"),
            Choice("weight_decay", 0.01, "mild, for a small network"), *_cosine_step(),
            Choice("warmup_epochs", 0.3 * epochs, "a long warm-up keeps the rank of the features up"),
            _tau_by_length(total), Choice("hidden_dim", 512, "in proportion to the network"),
            Choice("projection_dim", 128, "in proportion to the network")]


def _auto(facts: Facts, epochs: int, total: int, batch_size: int) -> list[Choice]:
    if facts.images < SMALL_SET:
        optimizer = Choice("optimizer", "sgd", f"published for sets under {SMALL_SET} images")
        hidden_dim = Choice("hidden_dim", 1024, "published for CIFAR-10")
        predictor = [Choice("predictor_lr", FAST_PREDICTOR, "as published in ProPos, and best on the sample")]
    else:
        optimizer = Choice("optimizer", "lars", "the paper's, for large sets")
        hidden_dim = Choice("hidden_dim", 4096, "the paper's")
        predictor = []
    return [optimizer, *_rates(str(optimizer.value), epochs, batch_size), *predictor, *_cosine_step(),
            Choice("warmup_epochs", min(10.0, epochs / 10), "a tenth of the run, at most 10 epochs"),
            _tau_by_length(total), hidden_dim, Choice("projection_dim", 256, "the paper's")]


def _rates(optimizer: str, epochs: int, batch_size: int) -> list[Choice]:
    """Learning rate per 256 images and weight decay that go with an optimizer; one's rates ruin another's run."""
    published = 1.0 if optimizer == "lars" else min(1.0, LARGEST_SCALED / batch_size)
    if optimizer == "lars":
        nearest = _nearest_preset(epochs)
        lr, weight_decay, _ = PAPER_PRESETS[nearest]
        reason = f"the paper's {nearest}-epoch preset"
    else:
        lr, weight_decay, reason = {
            "sgd": (0.12, 5e-4, "published for CIFAR-10, as 0.06 per 128 images with weight decay 5e-4"),
            "adam": (3e-4, 0.0, "usual for Adam in published BYOL code"),
            "adamw": (1e-3, 1e-2, "torch's own defaults for AdamW")}[optimizer]
    for_lr = reason if published == 1 else f"{reason}; no more than in batches of {LARGEST_SCALED}, as more collapses"
    return [Choice("lr", lr * published, for_lr), Choice("weight_decay", weight_decay, reason)]


def _paper(facts: Facts, epochs: int, total: int, batch_size: int) -> list[Choice]:
    nearest = _nearest_preset(epochs)
    lr, weight_decay, tau = PAPER_PRESETS[nearest]
    reason = f"the paper's {nearest}-epoch preset, made for ResNet-50 and batch 4096"
    return [Choice("optimizer", "lars", reason), Choice("lr", lr, reason), Choice("weight_decay", weight_decay, reason),
            Choice("warmup_epochs", min(10.0, epochs / 4), "the paper's 10 epochs, at most a quarter of the run"),
            *_cosine_step(), Choice("tau_base", tau, reason),
            Choice("hidden_dim", 4096, reason), Choice("projection_dim", 256, reason)]


def _quadra(facts: Facts, epochs: int, total: int, batch_size: int) -> list[Choice]:
    reason = "the source system's default"
    return [Choice("optimizer", "adam", reason), Choice("lr", 3e-4 * 256 / batch_size, f"{reason}, 3e-4 at every batch"),
            Choice("weight_decay", 0.0, reason),
            Choice("warmup_epochs", 0.0, reason), Choice("scheduler", "plateau", reason),
            Choice("scheduler_interval", "epoch", reason), Choice("tau_base", 0.9995, reason),
            Choice("tau_schedule", "cosine", reason), Choice("hidden_dim", 4096, reason),
            Choice("projection_dim", 256, reason)]


def _tau_by_length(total: int) -> Choice:
    return Choice("tau_base", half_life_tau(total), f"half-life of 3 % of {total} updates, at least 2, at most 173")


def _cosine_step() -> list[Choice]:
    return [Choice("scheduler", "cosine", "warm-up, then cosine to 0, as in the paper"),
            Choice("scheduler_interval", "step", "as in the paper"),
            Choice("tau_schedule", "cosine", "from the base to 1, as in the paper")]


def _nearest_preset(epochs: int) -> int:
    return min(PAPER_PRESETS, key=lambda preset: abs(preset - epochs))


def _views(recipe: str, size: int) -> tuple[ViewRecipe, ViewRecipe]:
    if recipe == "digits":
        return digits_recipes(size)
    if recipe == "auto" and size < SMALL_STEM_BELOW:
        return paper_recipes(size, blur=(0.0, 0.0))  # published settings for small images do not blur
    view1, view2 = paper_recipes(size)
    if recipe == "quadra":
        return replace(view1, interpolation="bilinear"), replace(view2, interpolation="bilinear")
    return view1, view2


def _min_scale(config: TrainConfig, images: int) -> Choice | None:
    """None for the paper's, or for views that do not crop."""
    if config.min_scale is not None:
        return as_asked("min_scale", config.min_scale)
    if config.recipe == "auto" and images < SMALL_SET:
        return Choice("min_scale", MIN_SCALE, "usual for small sets")
    return None


def with_min_scale(views: tuple[ViewRecipe, ViewRecipe], least: float) -> tuple[ViewRecipe, ViewRecipe]:
    """Raises: ValueError for a recipe that takes images whole."""
    if views[0].crop_scale is None:
        raise ValueError(f"--min-scale {least:g}: the views of the sample show whole images - leave it out")
    return replace(views[0], crop_scale=(least, 1.0)), replace(views[1], crop_scale=(least, 1.0))


def _choices_of_views(recipe: str, least: Choice | None, view1: ViewRecipe, view2: ViewRecipe) -> list[Choice]:
    """What of the views is chosen, for the log. least: share of the area, where it is not the paper's."""
    if recipe == "digits":
        return [Choice("views", "turned, zoomed, sheared, shifted, bent, blurred, noisy", "crops and flips change digits")]
    low, high = view1.crop_scale or (1.0, 1.0)
    of_blur = ("published settings for small images do not blur" if view1.blur == view2.blur == 0 else
               "the paper's, for one view and the other")
    return [Choice("crop_scale", f"{low:g} to {high:g}",
                   "share of the image's area: " + ("the paper's, at every size" if least is None else least.reason),
                   least is not None and least.asked),
            Choice("blur", f"{view1.blur:g} and {view2.blur:g}", of_blur),
            Choice("solarize", f"{view1.solarize:g} and {view2.solarize:g}", "the paper's, for one view and the other")]
