"""What a run has reached, and the files that show it: scores, the best network, pictures, summary, report."""

import contextlib
import json
import math
import time
from dataclasses import asdict
from typing import cast

import torch
from torch import nn

from byol_core.evaluate.features import embed_data
from byol_core.evaluate.health import judge
from byol_core.evaluate.scoring import Scorer, Scores, some_indices
from byol_core.losses import effective_rank
from byol_core.report.facts import VERDICT, read_run
from byol_core.report.page import how_to_load, write_report
from byol_core.report.pictures import save_embedding, save_neighbours, save_views
from byol_core.run.parts import Parts
from byol_core.runtime import peak_memory
from byol_core.system.console import own_words
from byol_core.system.files import State, export_backbone, write_json, write_text

PICTURED_AT_MOST = 2_000  # images among which neighbours are looked for
PIXELS_UP_TO = 16  # image size up to which raw pixels are a baseline
REPORT_EVERY = 30.0  # seconds between reports of a run under way, and more where writing one takes over 1 % of that
AMP_FLAGS = {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}


def in_words(score: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if score == "separation" else f"{value:.1%}"


class Outcome:
    """Scores by name of the network (pixels, untrained, trained) and what is made of them.

    Of several processes, the first one alone measures and writes.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.scores: dict[str, Scores] = {}
        self.best: dict[str, float] = {}  # of best.pt: epoch, and knn or, without labels, separation
        self.ranks: dict[str, float | None] = {"rank_features": None, "rank_features_untrained": None}
        self.report_due, self.report_failed = 0.0, False
        # What scores depend on beside the network: those of another classifier or test set are not to be compared.
        self.how_measured = f"{parts.config.classifier}; {parts.scorer.measured_on if parts.scorer else None}"

    def state_dict(self) -> State:
        return {"scores": self.scores, "best": self.best, "measured": self.how_measured}

    def load_state_dict(self, state: State) -> None:
        if state["measured"] == self.how_measured:
            self.scores = cast(dict[str, Scores], state["scores"])
            untrained = self.scores.get("untrained", {})
            if "separation" in untrained and "retrieval" not in untrained:  # of a run from before there was that score
                del self.scores["untrained"]
            if "separation" in untrained:  # the labels allowed no accuracy
                self.parts.scorer = self.parts.without_labels()
            if (self.parts.folder / "best.pt").exists():
                self.best = cast(dict[str, float], state.get("best", {}))

    def is_complete(self) -> bool:
        """Whether nothing is left to do, as the summary in the run folder says; the same answer in all processes."""
        parts = self.parts
        return parts.processes.from_first(lambda: parts.progress.epoch >= parts.plan.epochs and self._ended() == "finished")

    def _ended(self) -> object:
        """How summary.json says that the run ended; None where it does not, or is damaged."""
        try:
            return json.loads((self.parts.folder / "summary.json").read_text("utf-8"))["status"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def picture_views(self) -> None:
        """views.png, of the first images and views that the run trains on."""
        parts = self.parts
        batches = parts.batches.batches
        save_views(parts.folder / "views.png", parts.data, parts.plan.views, batches.order.epoch(0)[0], next(batches.epoch(0)))
        self._show_on_board("views.png")

    def _show_on_board(self, *pictures: str) -> None:
        if self.parts.log.board is not None:
            for name in pictures:
                self.parts.log.board.picture(self.parts.progress.updates, self.parts.folder / name)

    def measure_untrained(self) -> None:
        """What the network gives before it has learned anything, and, for images that small, what bare pixels give."""
        config = self.parts.config
        if "untrained" not in self.scores:
            self.measure("untrained", self.parts.new_model().online.backbone)
        if self.parts.plan.image_size <= PIXELS_UP_TO and isinstance(self.parts.scorer, Scorer):
            self.measure("pixels", nn.Flatten())
        for option, value in (("--eval-every", config.eval_every), ("--eval-data", self.parts.asked.eval_data)):
            if value and not config.eval:
                self.parts.log.say(f"note: {option} {value} has no effect with --no-eval")

    def measure(self, name: str, backbone: nn.Module) -> None:
        """Scores of `backbone` under `name`, unless it was measured before the run was resumed; with labels or without."""
        parts = self.parts
        if parts.scorer is None or name in self.scores:
            return
        try:
            self.scores[name] = parts.scorer.measure(backbone)
        except ValueError as error:
            with_labels = isinstance(parts.scorer, Scorer)
            parts.log.say(f"{'no accuracy' if with_labels else 'nothing measured'}: {error}")
            parts.scorer = parts.without_labels() if with_labels else None
            return self.measure(name, backbone)
        parts.log.say(f"{name}: " + "  ".join(f"{key} {in_words(key, value)}" for key, value in self.scores[name].items()
                                              if value is not None))

    def measure_on_the_way(self) -> None:
        parts = self.parts
        if parts.scorer is not None:
            with contextlib.suppress(ValueError):  # a feature is not finite, and the run about to say so
                value = parts.scorer.quick(parts.backbone)
                parts.log.record(parts.progress, **{parts.scorer.chosen_by: value})
                self._keep_best(parts.scorer.chosen_by, value)
            parts.log.start(parts.progress)

    def _keep_best(self, score: str, value: float) -> None:
        """best.pt is the network as it is now, unless one measured before was better; of equals it is the later one."""
        if value >= self.best.get(score, -math.inf):
            self.best = {score: value, "epoch": self.parts.progress.epoch}
            self._export("best", **self.best)

    def _export(self, name: str, **about: float) -> None:
        parts = self.parts
        export_backbone(parts.folder, parts.backbone.state_dict(), {**parts.about_backbone(), **about}, name)

    def report_under_way(self) -> None:
        """The facts and report.html as the run goes, to be true whenever someone looks; they never stop the run."""
        began = time.monotonic()
        if began < self.report_due:
            return
        try:
            self._write_facts("running")
            write_report(self.parts.folder, under_way=True)
        except Exception as error:  # also of a file in the run folder that somebody has damaged
            tell = self.parts.log.note if self.report_failed else self.parts.log.say
            tell(f"warning: no report for now: {own_words(error)} - the run goes on")
            self.report_failed = True
        self.report_due = began + max(REPORT_EVERY, 100 * (time.monotonic() - began))
        self.parts.log.start(self.parts.progress)

    def finish(self) -> None:
        """Everything that is made of a trained network: export, scores, pictures, summary, report."""
        self._export("backbone")
        self.measure("trained", self.parts.backbone)
        if self.parts.config.eval_every and self.parts.scorer is not None:
            score = self.parts.scorer.chosen_by
            value = self.scores.get("trained", {}).get(score)
            if value is not None:
                self._keep_best(score, value)
        if self.parts.config.eval:
            self._picture_features()
        self.write_end("finished")

    def _picture_features(self) -> None:
        parts, recipe, labels = self.parts, self.parts.plan.plain, self.parts.data.files.labels
        indices = some_indices(len(parts.data), PICTURED_AT_MOST)
        readable, trained = embed_data(parts.backbone, parts.data, recipe, indices, parts.runtime, parts.workers)
        untrained = parts.new_model().online.backbone
        _, before = embed_data(untrained, parts.data, recipe, readable, parts.runtime, parts.workers)
        with self.parts.log.warn_only():
            save_neighbours(parts.folder / "neighbours.png", parts.data, readable, trained, before, parts.config.seed)
            save_embedding(parts.folder / "embedding.png", trained, None if labels is None else labels[readable],
                           parts.data.files.classes, parts.config.seed)
        self.ranks = {"rank_features": float(effective_rank(trained)),
                      "rank_features_untrained": float(effective_rank(before))}
        self._show_on_board("neighbours.png", "embedding.png")

    def write_end(self, status: str, reason: str | None = None) -> None:
        """The facts and report.html, whatever way the run ended. reason: of a run that did not finish."""
        with self.parts.log.warn_only():
            self._write_facts(status, reason)
        with self.parts.log.warn_only():
            write_report(self.parts.folder)
        if self.parts.log.board is not None:
            self.parts.log.board.close()

    def _write_facts(self, status: str, reason: str | None = None) -> None:
        """summary.json and bad_files.txt."""
        summary = self._summary(status, reason)
        try:
            records, plan = read_run(self.parts.folder).records, self.parts.plan
            verdict = judge(records, plan.epochs, status, summary, asdict(plan))
            summary |= dict(zip(VERDICT, (verdict.word, verdict.why, verdict.advice)))
        finally:  # should it fail, the rest is written
            write_json(self.parts.folder / "summary.json", summary)
        self.write_bad_files()

    def write_bad_files(self) -> None:
        """bad_files.txt, where there are any."""
        parts = self.parts
        listing = parts.data.bad.listing()
        if parts.bad_eval_files is not None:
            listing += parts.bad_eval_files.listing(f"{parts.config.eval_data}/")
        if listing:
            write_text(parts.folder / "bad_files.txt", listing)

    def _summary(self, status: str, reason: str | None = None) -> dict[str, object]:
        parts, progress, log = self.parts, self.parts.progress, self.parts.log
        scores: dict[str, float | None] = {}
        for name, suffix in (("trained", ""), ("untrained", "_untrained"), ("pixels", "_pixels")):
            measured = {"knn": None, "linear": None, **self.scores.get(name, {})}
            scores |= {key + suffix: value for key, value in measured.items()}
        return {
            "status": status, "reason": reason, "images": len(parts.data), "classes": len(parts.data.files.classes),
            "bad_files": len(parts.data.bad.reasons),
            "bad_eval_files": len(parts.bad_eval_files.reasons) if parts.bad_eval_files else 0,
            "epochs": progress.epoch, "updates": progress.updates, "seconds": round(log.seconds, 3),
            "images_per_second": round(progress.updates * parts.plan.batch_size / max(log.seconds, 1e-9), 2),
            "wait_fraction": round(log.waited / max(log.seconds, 1e-9), 4),
            "loss": log.last.get("loss"), "spread": log.last.get("spread"), **scores, **self.ranks,
            "best_knn": self.best.get("knn"), "best_separation": self.best.get("separation"),
            "best_epoch": self.best.get("epoch"),
            "measured_on": parts.scorer.measured_on if parts.scorer else None,
            "measured_images": parts.scorer.measured_images if parts.scorer else None,
            "world_size": parts.processes.world_size, "device": str(parts.runtime.device),
            "amp": AMP_FLAGS[parts.runtime.amp_dtype], "peak_memory_mb": round(peak_memory(parts.runtime.device) / 1e6)}

    def say(self) -> None:
        """The closing lines: what was reached, and how to use it."""
        say, data, folder = self.parts.log.say, self.parts.data, self.parts.folder
        names = [name for name in ("pixels", "untrained", "trained") if name in self.scores]
        if names:
            say(f"{'accuracy' if 'knn' in self.scores[names[-1]] else '':<12}" + "".join(f"{name:>12}" for name in names))
            for key in self.scores[names[-1]]:
                say(f"{key:<12}" + "".join(f"{in_words(key, self.scores[name].get(key)):>12}" for name in names))
        if self.parts.config.eval and data.files.labels is None and self.parts.config.eval_data is None:
            say("no class folders, so no accuracy: look at neighbours.png, or pass a labelled folder as --eval-data")
        if data.bad.reasons:
            say(f"skipped {len(data.bad.reasons)} of {len(data)} images (bad_files.txt)")
        with self.parts.log.warn_only():
            verdict = read_run(folder).verdict
            if verdict.word != "starting":  # there are records to judge by
                say(f"{verdict.word}: {verdict.why}" + (f" - {verdict.advice}" if verdict.advice else ""))
        if self.best:
            score, value = next((name, self.best[name]) for name in self.best if name != "epoch")
            say(f"best: {score} {in_words(score, value)} after epoch {self.best['epoch']}, in {folder / 'best.pt'}")
        about, recipe = self.parts.about_backbone(), self.parts.plan.plain
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (recipe.mean, recipe.std))
        say(f"report: {folder / 'report.html'}\nuse it:\n{how_to_load(folder, about)}\n"
            f"# images: RGB in [0, 1] of {recipe.size} pixels, less the mean ({mean}), divided by the std ({std})")
