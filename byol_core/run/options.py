"""One frozen dataclass that is the list of options, their defaults and the command line at once (standard library only)."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from byol_core.images import digits
from byol_core.system.command import (AppendPaths, Parser, amount, auto_or_pixels, auto_or_workers, count, natural, passes,
                                      positive, share, unit)

LARGEST_OF_A_CHECKPOINT = 2**20  # no option that a recipe chooses is larger, and a network of such a width fits nowhere


def option(default: object, group: str, text: str, **argparse_options: object) -> Any:
    """A dataclass field that also describes its own command-line flag."""
    return field(default=default, metadata={"group": group, "help": text, **argparse_options})


@dataclass(frozen=True)
class TrainConfig:
    """Everything a person can ask of a run; None means "let the recipe choose from the data" (see `byol_core.run.plan`)."""

    data: tuple[str, ...] = option(("digits",), "data", "folders of images, flat or nested; class sub-folders are labels, "
                                   "used only for evaluation; or a .txt list of paths, or .tar shards; 'digits' is the "
                                   "embedded sample", nargs="+", action=AppendPaths, metavar="PATH")
    epochs: int = option(100, "training", "passes over the images", type=passes, metavar="N")
    minutes: float | None = option(None, "training", "train for about so long instead: as many updates as fit, by the time "
                                   "that a few of them take; a resumed run keeps their number", type=positive, metavar="F")
    out: str | None = option(None, "run folder", "run folder (default: runs/<name of the data>)", metavar="DIR")
    eval_data: str | None = option(None, "data", "labelled folder to measure on (default: a fifth of --data, stratified)",
                                   metavar="DIR")
    arch: str | None = option(None, "network", "any torchvision classification model, or conv4 or conv6, small networks for "
                              "small images (default: conv4 for small images and short runs, conv6 for the "
                              "sample, else resnet18)", metavar="NAME")
    image_size: int | None = option(None, "network", "edge in pixels of the images that the network is made for and measured "
                                    "on, or auto, from the images", type=auto_or_pixels, metavar="auto|N")
    view_size: int | None = option(None, "network", "edge in pixels of the random views that it is trained on: smaller ones "
                                   "are faster (default: --image-size; for conv4 with --recipe auto three quarters of "
                                   "it and at most 24, above 64 three eighths)", type=auto_or_pixels, metavar="auto|N")
    small_stem: bool | None = option(None, "network", "3x3 first convolution without pooling, for ResNets on small images "
                                     "(default: on for views below 48 pixels)", action=argparse.BooleanOptionalAction)
    hidden_dim: int | None = option(None, "network", "hidden width of projector and predictor", type=count, metavar="N")
    projection_dim: int | None = option(None, "network", "output width of projector and predictor", type=count, metavar="N")
    batch_size: int | None = option(None, "training", "images of one optimizer update, over all processes and "
                                    "accumulation steps (default: 64 in short runs to 256 in long ones; of few images fewer)",
                                    type=count, metavar="N")
    recipe: str = option("auto", "training", "auto: chosen from images, batch and epochs, and explained; paper: the "
                         "published preset nearest in epochs; quadra: the source system's defaults",
                         choices=("auto", "paper", "quadra"))
    optimizer: str | None = option(None, "training", "optimizer over the online network",
                                   choices=("auto", "lars", "sgd", "adam", "adamw"))
    lr: float | None = option(None, "training", "learning rate per 256 images; scaled by batch size / 256", type=positive,
                              metavar="F")
    predictor_lr: float | None = option(None, "training", "learning rate of the predictor, as a multiple of --lr",
                                        type=positive, metavar="F")
    weight_decay: float | None = option(None, "training", "weight decay; biases and 1-D tensors never decay", type=amount,
                                        metavar="F")
    warmup_epochs: float | None = option(None, "training", "linear warm-up of the learning rate, in epochs", type=amount,
                                         metavar="F")
    scheduler: str | None = option(None, "training", "learning-rate schedule", choices=("cosine", "plateau", "constant"))
    scheduler_interval: str | None = option(None, "training", "when the learning-rate schedule advances",
                                            choices=("step", "epoch"))
    tau_base: float | None = option(None, "training", "target momentum at the first update, in [0, 1]", type=unit,
                                    metavar="F")
    tau_schedule: str | None = option(None, "training", "cosine: from the base to 1; constant: the base throughout",
                                      choices=("cosine", "constant"))
    min_scale: float | None = option(None, "training", "smallest share of an image's area that a view shows, above 0, "
                                     "at most 1", type=share, metavar="F")
    accum_steps: int = option(1, "training", "micro-batches per optimizer update", type=count, metavar="N")
    classifier: str = option("logistic", "evaluation", "probe on frozen embeddings: logistic, knn, or the dotted name of "
                             "any scikit-learn classifier", metavar="NAME")
    eval_every: int = option(0, "evaluation", "epochs between measurements while training (kNN, or without labels "
                             "separation); 0: only before and after", type=natural, metavar="N")
    eval: bool = option(True, "evaluation", "no evaluation before and after training", flag="--no-eval",
                        action="store_false")
    save_every: int = option(1, "run folder", "epochs between checkpoints", type=count, metavar="N")
    views: str = option("auto", "machine", "where views are made: device: in batches on the device, from images in memory or "
                        "cropped by workers; cpu: by torchvision in workers, the reference",
                        choices=("auto", "device", "cpu"))
    device: str = option("auto", "machine", "auto, cpu, cuda, cuda:N or mps", metavar="NAME")
    amp: str = option("auto", "machine", "mixed precision; auto: bf16 or fp16 where the device is faster with it",
                      choices=("auto", "bf16", "fp16", "off"))
    compile: bool = option(False, "machine", "torch.compile the network", action="store_true")
    cuda_graph: bool = option(False, "machine", "on one GPU, launch forward and backward at once, as a CUDA graph: faster "
                              "where images or batches are small, for more GPU memory", action="store_true")
    workers: int | None = option(None, "machine", "data worker processes, or auto", type=auto_or_workers,
                                 metavar="auto|N")
    tensorboard: bool = option(False, "run folder", "write numbers and pictures for TensorBoard too, where it is installed",
                               action="store_true")
    seed: int = option(0, "training", "seed of everything random in the run", type=natural, metavar="N")
    resume: str | None = option(None, "run folder", "go on from the run folder's last checkpoint, or from PATH", nargs="?",
                                const="", metavar="PATH")
    init_from: str | None = option(None, "network", "start from the weights in this backbone file", metavar="PATH")
    check: bool = option(False, "run folder", "look at the data, draw the views, time a few steps, train nothing",
                         action="store_true")
    debug: bool = option(False, "run folder", "show the traceback of an error", action="store_true")


def _flag(option_field: "Field[Any]") -> tuple[str, dict[str, Any]]:
    """The flag and the argparse keywords that a field of `TrainConfig` describes."""
    described = dict(option_field.metadata)
    del described["group"]
    flag = described.pop("flag", "--" + option_field.name.replace("_", "-"))
    if isinstance(option_field.default, tuple):
        described["help"] += f" (default: {' '.join(option_field.default)})"
    elif option_field.default is not None and "action" not in described:
        described["help"] += f" (default: {option_field.default})"
    return flag, {**described, "dest": option_field.name, "default": option_field.default}


def check_option(name: str, value: object) -> None:
    """Raises: ValueError, or TypeError, for a value that the command line would not take, or that no run could have had."""
    described = next(option_field.metadata for option_field in fields(TrainConfig) if option_field.name == name)
    kind, allowed = described.get("type", str), described.get("choices")
    if described.get("action") is argparse.BooleanOptionalAction:
        fits = isinstance(value, bool)
    elif kind is str:
        fits = isinstance(value, str) and (allowed is None or value in allowed)
    else:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and value <= LARGEST_OF_A_CHECKPOINT
        try:
            fits = fits and kind(repr(value)) == value
        except argparse.ArgumentTypeError:
            fits = False
    if not fits:
        raise ValueError(f"{name}={value!r} is no value of that option")


def _program() -> str:
    """What follows "python" in the command that was given."""
    installed = sys.argv[0].replace("\\", "/").endswith("byol_core/__main__.py")
    return "-m byol_core" if installed else "train.py"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=_program().replace("-m", "python -m"), allow_abbrev=False,
                    description="Train BYOL on a folder of images, without labels.",
                    epilog=f"example: python {_program()} --data ./imgs --epochs 100")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option_field in fields(TrainConfig):
        title = option_field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        flag, described = _flag(option_field)
        groups[title].add_argument(flag, **described)
    return parser


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The options on the command line; exits with code 2 and one line when one of them is wrong."""
    words, parser = sys.argv[1:] if arguments is None else arguments, build_parser()
    values = vars(parser.parse_args(words))
    if {"--epochs", "--minutes"} <= {word.partition("=")[0] for word in words}:
        parser.error("--epochs and --minutes both say how long to train - give one of them")
    if values["optimizer"] == "auto":
        values["optimizer"] = None
    return TrainConfig(**values)


def command_line(config: TrainConfig, processes: int = 1) -> str:
    """The command that asks for `config` in so many processes; with --resume added, the one that goes on with it."""
    start, words = "python" if processes == 1 else f"torchrun --nproc-per-node={processes}", list[str]()
    for option_field in fields(TrainConfig):
        value, flag = getattr(config, option_field.name), _flag(option_field)[0]
        if value == option_field.default or option_field.name in ("resume", "check", "debug"):
            continue
        if isinstance(value, bool):
            words.append(flag if value or flag.startswith("--no-") else "--no-" + flag.removeprefix("--"))
        elif isinstance(value, tuple) and not any(part.startswith("-") for part in value):
            words += [flag, *value]
        else:
            for part in value if isinstance(value, tuple) else (str(value),):
                words += [f"{flag}={part}"] if part.startswith("-") else [flag, part]
    return f"{start} {_program()} {shlex.join(words)}".rstrip()


def with_sample(config: TrainConfig) -> TrainConfig:
    """The same options, where --data digits has become a folder to train on, one to measure on, and its own recipe."""
    if config.data != (digits.NAME,):
        return config
    train, test = digits.write_digits(digits.PLACE)
    return replace(config, data=(str(train),), eval_data=config.eval_data or str(test),
                   recipe="digits" if config.recipe == "auto" else config.recipe)
