"""`python -m byol_core.evaluate`: what a trained backbone's features are worth, beside what can be had without training."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from byol_core.system.command import Parser, backbone_parser, file_to_write, run_in_two_parts, say

if TYPE_CHECKING:  # torch and scikit-learn are loaded when there is something to do: --help need not wait
    from torch import Tensor, nn

    from byol_core.evaluate.features import Features
    from byol_core.evaluate.probes import Classifier
    from byol_core.images.image_set import ImageSet
    from byol_core.pretrained import Pretrained
    from byol_core.runtime import Runtime
    from byol_core.views.recipes import ViewRecipe

NEIGHBOURS = (20, 200)
FEW_LABELS = 1, 5, 10  # labels per class
COLLAPSED = 0.01  # spread below which features tell images apart no more; that of untrained networks is higher
SHOWN_CLASSES, SHOWN_CONFUSIONS = 20, 20  # on the console; --json holds the whole matrix


@dataclass
class Evaluation:
    """What is to be measured, found to be in order; `notes` are the remarks made on the way."""

    options: Namespace
    pretrained: "Pretrained"
    networks: "dict[str, tuple[nn.Module, ViewRecipe]]"
    runtime: "Runtime"
    workers: int
    files: "ImageSet"
    eval_files: "ImageSet | None"
    classifier: "Classifier | None"
    notes: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)
            say(line)


def build_parser() -> Parser:
    parser = backbone_parser("python -m byol_core.evaluate", "Measure the frozen features of a trained backbone, beside the "
                             "untrained network and the majority class.")
    parser.add_argument("--eval-data", metavar="DIR", help="labelled folder to measure on (default: a fifth of every class "
                        "of --data, whose labels the probes do not see)")
    parser.add_argument("--classifier", metavar="NAME", help="one more classifier: knn, logistic, or the dotted name of "
                        "any of scikit-learn's, such as sklearn.svm.LinearSVC")
    parser.add_argument("--baseline-weights", metavar="FILE", help="torchvision's weights for the same architecture, to "
                        "stand beside it")
    parser.add_argument("--json", metavar="FILE", help="write all results to FILE as well")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    return run_in_two_parts(lambda: prepare(options), carry_out, options.debug)


def prepare(options: Namespace) -> Evaluation:
    """Everything that can be wrong is found here, before any image goes through a network."""
    from byol_core.evaluate.probes import load_classifier
    from byol_core.evaluate.scoring import class_remark, scan_labelled
    from byol_core.pretrained import load_torchvision, open_backbone

    classifier = None if options.classifier is None else load_classifier(options.classifier)
    if options.json is not None:
        file_to_write("--json", options.json)
    notes: list[str] = []
    pretrained, runtime, workers = open_backbone(options, notes.append)
    networks = {"untrained": (pretrained.untrained(), pretrained.recipe)}
    if options.baseline_weights is not None:
        networks["weights"] = load_torchvision(Path(options.baseline_weights), pretrained)
    networks[options.network] = pretrained.backbone, pretrained.recipe
    files = scan_labelled(options.data, "--data", say)
    eval_files = None if options.eval_data is None else scan_labelled(options.eval_data, "--eval-data", say)
    evaluation = Evaluation(options, pretrained, networks, runtime, workers, files, eval_files, classifier)
    for line in notes:
        evaluation.note(line)
    remark = None if eval_files is None else class_remark(files, eval_files)
    if remark is not None:
        evaluation.note(f"warning: {remark}")
    _check_overlap(evaluation)
    return evaluation


def _check_overlap(evaluation: Evaluation) -> None:
    """Warn when images measured on are fitted on too. Raises: ValueError when the labels of --data allow no split."""
    import torch

    from byol_core.evaluate.features import Features, split
    from byol_core.images.duplicates import overlap

    files, eval_files = evaluation.files, evaluation.eval_files
    fit: Sequence[int] = range(len(files))
    if eval_files is not None:
        test: Sequence[int] = range(len(eval_files))
    else:
        assert files.labels is not None
        fit, test = (rows.tolist() for rows in split(Features(torch.empty(len(files), 0), files.labels)))
        eval_files = files
    same_file, same_content = overlap(files, fit, eval_files, test)
    if same_file or same_content:
        evaluation.note(f"warning: {same_file + same_content} of {len(test)} images measured on are also fitted on "
                        f"({same_file} the same file, {same_content} a file of the same content), which flatters the "
                        "accuracies")


def carry_out(evaluation: Evaluation) -> None:
    """Raises: ValueError, OSError or RuntimeError for what only shows while running, such as too many broken files."""
    from byol_core.evaluate.scoring import Scorer
    from byol_core.system.files import write_json
    from byol_core.views.pixels import load_images

    runtime, workers = evaluation.runtime, evaluation.workers
    device = runtime.device
    data = load_images(evaluation.files, "auto", device, evaluation.note, workers)[0]
    eval_data = (None if evaluation.eval_files is None
                 else load_images(evaluation.eval_files, "auto", device, evaluation.note, workers)[0])
    accuracies: dict[str, dict[str, float]] = {"majority": {}}
    for name, (backbone, recipe) in evaluation.networks.items():
        runtime.place_model(backbone)
        fit, test = Scorer(data, eval_data, recipe, runtime, workers, at_most=None).features(backbone)
        say(f"{name}: {len(fit.y)} images to fit on, {len(test.y)} to measure on")
        _check_spread(evaluation, name, fit)
        accuracies[name], predicted = _measure(evaluation, name, fit, test)
    majority = float((test.y == fit.y.mode().values).double().mean())
    accuracies["majority"] = dict.fromkeys(accuracies[name], majority)
    split = (f"fitted on {len(fit.y)} images of {data.files.given}, measured on " +
             (f"the {len(test.y)} held out of it, a fifth of every class" if eval_data is None
              else f"{len(test.y)} images of {eval_data.files.given}"))
    confusion = confusion_matrix(test.y, predicted, len(data.files.classes))
    if evaluation.options.json is not None:
        write_json(Path(evaluation.options.json), _as_json(evaluation, accuracies, confusion, split))
    sys.stdout.write(f"{split}\n{_table(accuracies)}\n\n{_confusion_text(evaluation, confusion)}\n")


def _check_spread(evaluation: Evaluation, name: str, features: "Features") -> None:
    from byol_core.losses import spread

    value = float(spread(features.x))
    if value < COLLAPSED:
        evaluation.note(f"warning: the {name} network has collapsed: its features of all images are nearly the same (spread "
                        f"{value:.2g}, under {COLLAPSED}); compare with the majority class")


def _measure(evaluation: Evaluation, name: str, fit: "Features", test: "Features") -> "tuple[dict[str, float], Tensor]":
    """(accuracies in [0, 1] by metric, the linear probe's predictions)."""
    from byol_core.evaluate.probes import knn_accuracy
    from byol_core.evaluate.scoring import accuracy_of_probe, few_label_accuracies, usual_probe

    def predict(classifier: "Classifier | None", metric: str) -> "Tensor":
        accuracies[metric], predicted, remark = accuracy_of_probe(fit, test, classifier)
        if remark is not None:
            evaluation.note(f"note: {metric} of {name}: {remark}")
        return predicted

    accuracies: dict[str, float] = {}
    for k in NEIGHBOURS:
        if k > len(fit.y):
            evaluation.note(f"note: knn_{k} uses {len(fit.y)} neighbours, all images there are to fit on")
        accuracies[f"knn_{k}"] = knn_accuracy(fit.x, fit.y, test.x, test.y, k)
    accuracies |= few_label_accuracies(fit, test, FEW_LABELS, lambda line: evaluation.note(f"note: {line}"))
    probe = usual_probe(fit, evaluation.runtime.device)
    evaluation.note("note: linear is " + ("scikit-learn's logistic regression on standardised features" if probe is None else
                                          "SGD on frozen features, the published protocol"))
    predicted = predict(probe, "linear")
    if evaluation.options.classifier is not None:
        try:
            predict(evaluation.classifier, evaluation.options.classifier)
        except Exception as error:  # classifiers raise whatever they like
            raise RuntimeError(f"--classifier {evaluation.options.classifier} failed on the features of the {name} network: "
                               f"{error}") from error
    return accuracies, predicted


def confusion_matrix(true: "Tensor", predicted: "Tensor", classes: int) -> "Tensor":
    """(classes + 1, classes) counts: row by true class, the last for -1, which stands for all others; column by prediction."""
    import torch

    rows = torch.where(true < 0, classes, true)
    return torch.bincount(rows * classes + predicted, minlength=(classes + 1) * classes).view(classes + 1, classes)


def _table(accuracies: dict[str, dict[str, float]]) -> str:
    metrics = list(next(reversed(accuracies.values())))
    width = max(map(len, [*metrics, "accuracy"])) + 2
    lines = [f"{'accuracy':<{width}}" + "".join(f"{name:>12}" for name in accuracies)]
    lines += [f"{metric:<{width}}" + "".join(f"{values[metric]:>12.1%}" for values in accuracies.values())
              for metric in metrics]
    return "\n".join(lines)


def _confusion_text(evaluation: Evaluation, confusion: "Tensor") -> str:
    """The matrix of the linear probe on the trained network, or the most frequent confusions where it would be too large."""
    columns = evaluation.files.classes
    rows = [*columns, "others"]
    title = f"linear probe of the {evaluation.options.network} network: true class by row, predicted class by column"
    if len(columns) <= SHOWN_CLASSES:
        width = max(len(str(int(confusion.max()))), *(min(len(name), 12) for name in columns)) + 2
        lines = [f"{'':<14}" + "".join(f"{name[:12]:>{width}}" for name in columns)]
        lines += [f"{name[:12]:<14}" + "".join(f"{count:>{width}}" for count in counts)
                  for name, counts in zip(rows, confusion.tolist()) if name != "others" or sum(counts)]
        return "\n".join([title, *lines])
    wrong = confusion.clone()
    wrong[:len(columns)].fill_diagonal_(0)
    counts, places = wrong.flatten().topk(min(SHOWN_CONFUSIONS, wrong.numel()))
    lines = [f"{count:>6}  {rows[place // len(columns)]} taken for {columns[place % len(columns)]}"
             for count, place in zip(counts.tolist(), places.tolist()) if count]
    return "\n".join([f"most frequent confusions of the linear probe of the {evaluation.options.network} network", *lines])


def _as_json(evaluation: Evaluation, accuracies: dict[str, dict[str, float]], confusion: "Tensor",
             split: str) -> dict[str, object]:
    pretrained = evaluation.pretrained
    return {
        "checkpoint": str(pretrained.path), "network": pretrained.network, "arch": pretrained.arch,
        "image_size": pretrained.recipe.size, "feature_dim": pretrained.feature_dim, "seed": pretrained.seed,
        "results": [{"network": name, "metric": metric, "accuracy": value, "split": split}
                    for name, values in accuracies.items() for metric, value in values.items()],
        "confusion": {"network": pretrained.network, "metric": "linear", "split": split,
                      "true": [*evaluation.files.classes, None], "predicted": list(evaluation.files.classes),
                      "counts": confusion.tolist()},
        "notes": evaluation.notes,
    }


if __name__ == "__main__":
    sys.exit(main())
