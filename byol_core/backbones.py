"""A torchvision classification model by name, turned into a feature extractor."""

import contextlib
import difflib
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from importlib import metadata

import torch
from torch import Tensor, nn

from byol_core.system.console import is_out_of_memory
from byol_core.system.seeds import seed_from

OWN = ("conv4", "conv6")  # networks that torchvision does not have


def check_torchvision() -> None:
    """Raises: ValueError when torchvision was built for another torch, of which its own message says nothing."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:  # an operator that does not exist
        raise ValueError(f"torch {torch.__version__} and torchvision {metadata.version('torchvision')} do not match - "
                         "reinstall both together") from error


@contextlib.contextmanager
def weights_of_seed(seed: int) -> Iterator[None]:
    """What is built first in this block has the weights that a run of this seed starts with; torch's generator stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(seed, "weights"))
        yield


def build_backbone(name: str, small_images: bool = False, image_size: int | None = None) -> tuple[nn.Module, int]:
    """(feature extractor with random weights, feature dimension) of the torchvision classification model `name`.

    The model's last nn.Linear becomes an identity, so that the other tensors keep torchvision's own names. Two are ours:
    `conv4`, four 3x3 convolutions for images of 32 to 96 pixels, and `conv6`, six narrower ones for images of 8 to 32.
    small_images: for ResNets, a 3x3 first convolution of stride 1 and no max-pooling. image_size: edge of the images in
    pixels, for models whose layers depend on it (vision transformers).
    Returns: the module maps (B, 3, S, S) to (B, feature_dim).
    Raises: ValueError for an unknown name, a model that has no final nn.Linear, or a small stem on anything but a ResNet.
    """
    if name in OWN:
        if small_images:
            raise ValueError(f"--small-stem is for ResNets, and {name} is made for small images - leave it out")
        return (_conv4(), 512) if name == "conv4" else (_conv6(), 128)
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *OWN], n=1)
        raise ValueError(f"unknown arch {name!r}{f' - did you mean {near[0]}?' if near else ''} "
                         f"(any torchvision classification model, {' or '.join(OWN)})")
    accepted = inspect.signature(models.get_model_builder(name)).parameters
    options: dict[str, object] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    if image_size is not None and name.startswith(("vit_", "maxvit")):
        options["image_size" if name.startswith("vit_") else "input_size"] = (
            image_size if name.startswith("vit_") else (image_size, image_size))
    assert "weights" in accepted
    try:
        model = models.get_model(name, **options)
    except ValueError as error:
        raise ValueError(f"{name} cannot be built for {image_size}-pixel images: {error}") from error
    feature_dim = _drop_last_linear(model, name)
    if small_images:
        _use_small_stem(model, name)
    return model, feature_dim


def _drop_last_linear(model: nn.Module, name: str) -> int:
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not layers or layers[-1][1].out_features != 1000:
        raise ValueError(f"arch {name!r} does not end in a linear layer, so it has no feature vector to train on - "
                         "choose another, or pass your own nn.Module from Python")
    path, last = layers[-1]
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Identity())
    return last.in_features


def _use_small_stem(model: nn.Module, name: str) -> None:
    from torchvision.models import ResNet

    if not isinstance(model, ResNet):
        raise ValueError(f"--small-stem is for ResNets, not for {name} - leave it out")
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision draws its own
    model.maxpool = nn.Identity()


def _conv4() -> nn.Module:
    """Four 3x3 convolutions of 64, 128, 256, 512 channels, all but the last max-pooled, then BN and ReLU; mean over space.

    Pooling before batch norm and ReLU, which are then of a quarter of the pixels, saves a fifth of the time. The largest of
    four values lies above their mean, so the biases of these batch norms begin at 0.7: with 0, fewer units fire, and less
    is learned.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for number, width in enumerate((64, 128, 256, 512), start=1):
        layers[f"conv{number}"] = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(layers[f"conv{number}"].weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
        norm = nn.BatchNorm2d(width)
        if number < 4:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
            nn.init.constant_(norm.bias, 0.7)
        layers[f"norm{number}"] = norm
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        channels = width
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    return nn.Sequential(layers)


def _conv6() -> nn.Module:
    """Six 3x3 conv-BN-ReLU layers of 32, 32, 64, 64, 128, 128 channels, the third and fifth of stride 2; mean over space."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for number, (width, stride) in enumerate(((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)), start=1):
        layers[f"conv{number}"] = nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
        layers[f"bn{number}"] = nn.BatchNorm2d(width)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        channels = width
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    return nn.Sequential(layers)


@torch.no_grad()
def check_backbone(backbone: nn.Module, feature_dim: int, image_size: int) -> None:
    """Run one blank image through `backbone`; its mode and weights stay as they are.

    Raises: ValueError when it cannot take images of that size or returns anything but `feature_dim` numbers an image.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        features: Tensor = backbone(torch.zeros(1, 3, image_size, image_size)).flatten(1)
    except (RuntimeError, AssertionError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"the network cannot take {image_size}-pixel images ({reason}) - "
                         "use a larger --image-size and --view-size, or another --arch") from error
    finally:
        backbone.train(was_training)
    if features.shape != (1, feature_dim):
        raise ValueError(f"the network returns {tuple(features.shape)[1:]} numbers an image, not ({feature_dim},) - "
                         "choose another --arch")


def load_weights(backbone: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a weights file's tensors into `backbone`; a classifier's, which it does not have, are left out.

    Batch norm's counters, which torchvision's older files lack, start at 0 where they are missing.
    Raises: ValueError naming the first tensor that is missing, unknown or misshapen, with nothing changed.
    """
    own = backbone.state_dict()
    counters = {name: torch.zeros_like(tensor) for name, tensor in own.items() if name.endswith("num_batches_tracked")}
    weights = counters | weights
    weights = {name: tensor for name, tensor in weights.items()
               if name in own or not name.startswith(("fc.", "classifier.", "head.", "heads."))}
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights or name not in own:
            raise ValueError(f"'{name}' is {'missing' if name in own else 'unknown'}")
        if weights[name].shape != own[name].shape:
            raise ValueError(f"'{name}' has shape {tuple(weights[name].shape)}, the network's {tuple(own[name].shape)}")
    backbone.load_state_dict(weights)
