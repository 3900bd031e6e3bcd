"""What frozen features are worth; `python -m byol_core.evaluate`. Names are loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from byol_core.evaluate.features import Features as Features
    from byol_core.evaluate.features import embed as embed
    from byol_core.evaluate.probes import classifier_accuracy as classifier_accuracy
    from byol_core.evaluate.probes import fit_classifier as fit_classifier
    from byol_core.evaluate.probes import knn_accuracy as knn_accuracy

__all__ = ["Features", "classifier_accuracy", "embed", "fit_classifier", "knn_accuracy"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module(f"byol_core.evaluate.{'features' if name in ('Features', 'embed') else 'probes'}"), name)
    raise AttributeError(f"module 'byol_core.evaluate' has no attribute {name!r}")
