"""A backbone out of a run folder, a backbone.pt or a checkpoint, with everything that is needed to use it."""

import json
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from byol_core.backbones import build_backbone, check_torchvision, load_weights, weights_of_seed
from byol_core.runtime import Runtime, choose_device, choose_precision
from byol_core.system.files import (CheckpointError, State, backbone_weights, newest_checkpoint, read_checkpoint, read_weights,
                                    sha256, without_wrappers)
from byol_core.views.pixels import choose_workers
from byol_core.views.recipes import IMAGENET_MEAN, IMAGENET_STD, ViewRecipe


@dataclass(frozen=True)
class Pretrained:
    """backbone: maps (B, 3, S, S) to (B, feature_dim). recipe: how an image becomes its input. seed: that of its run.

    notes: what was passed over on the way to it, such as a damaged file.
    """

    backbone: nn.Module
    feature_dim: int
    arch: str
    small_stem: bool
    recipe: ViewRecipe
    seed: int
    network: str
    path: Path
    notes: tuple[str, ...] = ()

    def untrained(self) -> nn.Module:
        """The same network as the seed of its run started it, but for --init-from."""
        return untrained_backbone(self.arch, self.small_stem, self.recipe.size, self.seed)[0]


def open_backbone(options: Namespace, note: Callable[[str], None]) -> tuple[Pretrained, Runtime, int]:
    """(backbone, runtime, worker processes) that the options of `backbone_parser` name. note: takes warnings."""
    device = choose_device(options.device)[0]
    pretrained = load_pretrained(options.checkpoint, options.network)
    for line in pretrained.notes:
        note(f"warning: {line}")
    runtime = Runtime(device, choose_precision("auto", device, pretrained.arch)[0], channels_last=True)
    return pretrained, runtime, choose_workers(options.workers)


def untrained_backbone(arch: str, small_stem: bool, image_size: int, seed: int) -> tuple[nn.Module, int]:
    """(the backbone as a run of this seed starts it, feature dimension); torch's own generator stays as it is."""
    with weights_of_seed(seed):
        return build_backbone(arch, small_stem, image_size)


def load_pretrained(source: str | Path, network: str = "online") -> Pretrained:
    """The backbone in `source`: a run folder, its backbone.pt with backbone.json beside it, or a checkpoint such as last.pt.

    Of a run folder, backbone.pt is taken where it is there, else (and for "target") the newest whole checkpoint.
    network: "online" or "target".
    Raises: CheckpointError (a ValueError) saying what is wrong with the file or missing beside it.
    """
    check_torchvision()
    source = Path(source)
    if not source.exists():
        raise CheckpointError(f"no such file or folder: {source} - check --checkpoint")
    if source.is_dir() and network == "online" and (source / "backbone.pt").exists():
        source = source / "backbone.pt"
    if source.is_dir():
        state, damaged = newest_checkpoint(source)
        if state is None:
            wanted = "last.pt, which alone holds the target network" if network == "target" else "backbone.pt or last.pt"
            raise CheckpointError(f"--checkpoint {source} has no {wanted}")
        return _from_checkpoint(state, network, source, tuple(f"{line}; used the one before it" for line in damaged))
    if source.with_suffix(".json").exists():
        return _from_export(source, network)
    if source.name == "backbone.pt":
        raise CheckpointError(f"{source} has no backbone.json beside it, which says how to use it - copy it there, or give "
                              "the run folder or its last.pt")
    return _from_checkpoint(read_checkpoint(source), network, source)


def _from_export(source: Path, network: str) -> Pretrained:
    beside = source.with_suffix(".json")
    try:
        about = json.loads(beside.read_text("utf-8"))
        if about["network"] != network:
            raise CheckpointError(f"{source} holds the {about['network']} network only - give the run folder or its last.pt "
                                  f"for --network {network}")
        weights = read_weights(source)
        if sha256(source) != about["sha256"]:
            raise CheckpointError(f"{source} is not the file that {beside.name} describes (their sha256 differ) - "
                                  "copy both from the run folder, or give its last.pt")
        recipe = ViewRecipe(about["image_size"], crop_scale=None if about["whole_image"] else (1.0, 1.0),
                            interpolation=about["interpolation"], mean=tuple(about["mean"]), std=tuple(about["std"]))
        return _build(about, recipe, weights, source)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{beside} does not describe a backbone ({type(error).__name__}: {error}) - "
                              "give the run's last.pt instead") from error


def _from_checkpoint(state: State, network: str, source: Path, notes: tuple[str, ...] = ()) -> Pretrained:
    try:
        about = json.loads(str(state["identity"]))
        view = about["views"][0]
        recipe = ViewRecipe(about["image_size"], crop_scale=view["crop_scale"], interpolation=view["interpolation"],
                            mean=tuple(view["mean"]), std=tuple(view["std"]))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{source} does not describe its network ({type(error).__name__}: {error})") from error
    return _build({**about, "network": network}, recipe, backbone_weights(state, network, source), source, notes)


def _build(about: Mapping[str, object], recipe: ViewRecipe, weights: dict[str, Tensor], source: Path,
           notes: tuple[str, ...] = ()) -> Pretrained:
    arch, small_stem, seed = str(about["arch"]), bool(about["small_stem"]), int(str(about["seed"]))
    backbone, feature_dim = untrained_backbone(arch, small_stem, recipe.size, seed)
    try:
        load_weights(backbone, weights)
    except ValueError as error:
        raise CheckpointError(f"{source} does not fit {arch}: {error}") from error
    return Pretrained(backbone.eval(), feature_dim, arch, small_stem, recipe, seed, str(about["network"]), source, notes)


def load_torchvision(path: Path, like: Pretrained) -> tuple[nn.Module, ViewRecipe]:
    """(the same architecture with torchvision's weights in `path`, how images of the same size become its input).

    Its stem is that of `like`, or ImageNet's where the weights are made for that.
    Raises: CheckpointError when the file cannot be read or does not fit.
    """
    weights = _read_torchvision(path)
    problem = ""
    for small_stem in sorted({like.small_stem, False}, reverse=True):
        backbone = untrained_backbone(like.arch, small_stem, like.recipe.size, like.seed)[0]
        try:
            load_weights(backbone, weights)
            return backbone.eval(), replace(like.recipe, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        except ValueError as error:
            problem = str(error)
    raise CheckpointError(f"--baseline-weights {path} does not fit {like.arch}: {problem}")


def _read_torchvision(path: Path) -> dict[str, Tensor]:
    """Weights in torch's present format or in the one before it, in which some of torchvision's files still are."""
    if not path.is_file() or zipfile.is_zipfile(path):
        return read_weights(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers raise whatever they like on broken input
        raise CheckpointError(f"--baseline-weights {path} is damaged or not a weights file") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"--baseline-weights {path} does not hold a network's weights")
    return without_wrappers(dict(weights))
