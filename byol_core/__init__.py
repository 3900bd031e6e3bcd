"""BYOL in plain PyTorch: the networks, the loss, the loop, and the moving average that other code can import.

Names are loaded when first used, so that `import byol_core` costs nothing and loads neither torchvision nor scikit-learn.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from byol_core.version import __version__

if TYPE_CHECKING:
    from byol_core.backbones import build_backbone as build_backbone
    from byol_core.ema import ema_update as ema_update
    from byol_core.lars import LARS as LARS
    from byol_core.losses import byol_loss as byol_loss
    from byol_core.networks import BYOL as BYOL
    from byol_core.pretrained import load_pretrained as load_pretrained
    from byol_core.runtime import Runtime as Runtime
    from byol_core.schedules import cosine_tau as cosine_tau
    from byol_core.training import train as train
    from byol_core.views.sources import open_batches as open_batches

_HOME = {"ema_update": "ema", "cosine_tau": "schedules", "byol_loss": "losses", "LARS": "lars", "BYOL": "networks",
         "train": "training", "open_batches": "views.sources", "Runtime": "runtime", "build_backbone": "backbones",
         "load_pretrained": "pretrained"}
_MODULES = ("backbones", "ema", "embed", "evaluate", "export", "lars", "losses", "networks", "pretrained", "runtime",
            "schedules", "training")

__all__ = [*_HOME, *_MODULES, "__version__"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"byol_core.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"byol_core.{name}")
    raise AttributeError(f"module 'byol_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
