"""The numbers by which a run is judged, on images whose labels the training never sees."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from sklearn.base import clone
from torch import Tensor, nn

from byol_core.evaluate.features import Features, embed_data, split
from byol_core.evaluate.probes import (Classifier, LinearProbe, few_label_accuracy, fit_classifier, knn_accuracy,
                                       too_large_for_sklearn, unconverged)
from byol_core.images.image_set import ImageSet, scan
from byol_core.runtime import Runtime
from byol_core.system.console import one_line
from byol_core.views.pixels import ImageData
from byol_core.views.recipes import ViewRecipe

# Accuracies in [0, 1]: knn, linear (None where it failed), linear_N: N labels per class; without labels, separation and the
# accuracy of retrieval.
Scores = dict[str, float | None]
NAMED_AT_MOST = 5  # classes, in a remark
MEASURED_AT_MOST = 50_000  # images per set; more add time, not information
FEW_LABELS, FEW_LABELS_CLASSES = (1, 5), 100  # labels per class for which a probe is measured too; with more classes none


class Scorer:
    """Measures backbones on the labelled images of a run: fits on --data, tests on --eval-data or a fifth kept apart.

    data: labelled. eval_data: labelled, or None. classifier: a scikit-learn classifier; None for logistic regression, by SGD
    on large sets. report: takes what is to be said of it. at_most: images of each set that are measured; None for all.
    """

    chosen_by = "knn"  # what `quick` gives, and the best network is chosen by
    measured_images: int | None = None  # on how many accuracies rest, once there are any

    def __init__(self, data: ImageData, eval_data: ImageData | None, recipe: ViewRecipe, runtime: Runtime, workers: int,
                 classifier: Classifier | None = None, report: Callable[[str], None] = lambda line: None,
                 at_most: int | None = MEASURED_AT_MOST) -> None:
        self.data, self.eval_data = data, eval_data
        self.recipe, self.runtime, self.workers = recipe, runtime, workers
        self.classifier, self.report, self.at_most = classifier, report, at_most
        self.measured_on = ("a fifth of the images, whose labels the probe did not see" if eval_data is None
                            else f"{len(eval_data)} images of {eval_data.files.given}")

    def quick(self, backbone: nn.Module) -> float:
        """Accuracy of weighted kNN alone, for measuring on the way."""
        fit, test = self.features(backbone)
        return knn_accuracy(fit.x, fit.y, test.x, test.y)

    def measure(self, backbone: nn.Module) -> Scores:
        """All accuracies. Raises: ValueError when the labels do not allow any."""
        fit, test = self.features(backbone)
        scores: Scores = {"knn": knn_accuracy(fit.x, fit.y, test.x, test.y), "linear": None}
        classifier = usual_probe(fit, self.runtime.device) if self.classifier is None else self.classifier
        try:
            scores["linear"], _, remark = accuracy_of_probe(fit, test, classifier)
        except ValueError as error:  # the labels do not suit this classifier
            remark = f"the classifier failed, so there is no linear accuracy: {one_line(error)}"
        if remark is not None:
            self.report(f"warning: {remark}")
        return scores | few_label_accuracies(fit, test, FEW_LABELS)

    def features(self, backbone: nn.Module) -> tuple[Features, Features]:
        """(features to fit on, features to measure on)."""
        fit, test = self._features(backbone)
        self.measured_images = len(test.y)
        return fit, test

    def _features(self, backbone: nn.Module) -> tuple[Features, Features]:
        features = self._embed(backbone, self.data)
        if self.eval_data is None:
            fit, test = split(features)
            return features.at(fit), features.at(test)
        test_features = self._embed(backbone, self.eval_data)
        places = class_places(self.data.files, self.eval_data.files)
        return features, Features(test_features.x, places[test_features.y])

    def _embed(self, backbone: nn.Module, data: ImageData) -> Features:
        assert data.files.labels is not None
        indices, x = embed_data(backbone, data, self.recipe, some_indices(len(data), self.at_most or len(data)),
                                self.runtime, self.workers)
        return Features(x, data.files.labels[indices])


def usual_probe(fit: Features, device: torch.device) -> Classifier | None:
    """SGD on large sets, and None, which stands for logistic regression, on others."""
    return LinearProbe(device=device) if too_large_for_sklearn(fit.x, int(fit.y.max()) + 1) else None


def accuracy_of_probe(fit: Features, test: Features, classifier: Classifier | None) -> tuple[float, Tensor, str | None]:
    """(accuracy in [0, 1], the classes it predicts, what is to be said of its fitting) of a fresh copy of a classifier."""
    fitted = fit_classifier(fit.x, fit.y, None if classifier is None else clone(classifier, safe=False))
    predicted = torch.as_tensor(fitted.predict(test.x.numpy()))
    return float((predicted == test.y).double().mean()), predicted, unconverged(fitted)


def few_label_accuracies(fit: Features, test: Features, counts: Sequence[int],
                         report: Callable[[str], None] = lambda line: None) -> dict[str, float]:
    """`few_label_accuracy` as linear_N for each number of labels that every class has. report: takes why one is left out."""
    per_class = torch.bincount(fit.y)
    fewest = int(per_class[per_class > 0].min())
    scores: dict[str, float] = {}
    for count in counts:
        if len(per_class) > FEW_LABELS_CLASSES or count > fewest:
            report(f"no linear_{count}: " + (f"more than {FEW_LABELS_CLASSES} classes" if count <= fewest else
                                             f"a class has only {fewest} images to fit on"))
        else:
            scores[f"linear_{count}"] = few_label_accuracy(fit, test, count)
    return scores


def scan_labelled(data: str | Sequence[str], flag: str, say: Callable[[str], None],
                  leave_out: Sequence[Path] = ()) -> ImageSet:
    """The images of `data`, of which `say` takes what is amiss. Raises: ValueError when they have no classes."""
    files = scan(data, flag, leave_out)
    for remark in files.remarks:
        say(f"warning: {remark}" if flag == "--data" else f"warning: {flag}: {remark}")
    if files.labels is None:
        raise ValueError(f"{flag} {files.given} has fewer than the 2 classes that measuring needs - put the images of each "
                         "class in a sub-folder of its own")
    return files


def class_places(files: ImageSet, eval_files: ImageSet) -> Tensor:
    """Of each class of `eval_files` the place among those of `files`; -1, which is never predicted, where it is not there."""
    place = {name: number for number, name in enumerate(files.classes)}
    return torch.tensor([place.get(name, -1) for name in eval_files.classes])


def class_remark(files: ImageSet, eval_files: ImageSet) -> str | None:
    """What to say of classes that cannot be predicted. Raises: ValueError when that is all of them."""
    assert eval_files.labels is not None
    unknown = class_places(files, eval_files) < 0
    if unknown.all():
        raise ValueError(f"no class of --eval-data {eval_files.given} is a class of --data {files.given} - name the "
                         "sub-folders alike")
    names = [name for name, is_unknown in zip(eval_files.classes, unknown.tolist()) if is_unknown]
    some = ", ".join(names[:NAMED_AT_MOST]) + (f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else "")
    return None if not names else (f"classes of --eval-data that --data does not have: {some}; their "
                                   f"{int(unknown[eval_files.labels].sum())} images count as wrong")


def some_indices(images: int, at_most: int) -> Tensor:
    """All images, or a fixed random choice of them, in order."""
    if images <= at_most:
        return torch.arange(images)
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(images, generator=generator)[:at_most].sort().values
