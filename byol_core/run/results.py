"""What a run has reached, and the files that show it: scores, the best network, pictures, summary, report."""

import contextlib
import json
import math
import time
from dataclasses import replace
from functools import partial
from typing import cast

from torch import nn

from byol_core.evaluate.features import embed_data
from byol_core.evaluate.scoring import Scores, some_indices
from byol_core.losses import effective_rank
from byol_core.report.facts import VERDICT, parse_object, read_run, read_text, shown
from byol_core.report.page import how_to_load, write_report
from byol_core.report.pictures import save_embedding, save_neighbours, save_views
from byol_core.run.data import Measuring
from byol_core.run.log import RunLog
from byol_core.run.setup import Setup
from byol_core.run.state import TrainingState
from byol_core.runtime import AMP_DTYPES, peak_memory
from byol_core.system.console import own_words
from byol_core.system.files import State, export_backbone, write_json, write_text
from byol_core.views.pixels import ImageData
from byol_core.views.sources import Batches

PICTURED_AT_MOST = 2_000  # images among which neighbours are looked for
PIXELS_UP_TO = 16  # image size up to which raw pixels are a baseline
REPORT_EVERY = 30.0  # seconds between reports of a run under way, and more where writing one takes over 1 % of that


class Results:
    """Scores by name of the network (pixels, untrained, trained) and what is made of them.

    Of several processes, the first one alone measures and writes.
    """

    def __init__(self, setup: Setup, log: RunLog, state: TrainingState, images: ImageData, measuring: Measuring) -> None:
        self.setup, self.log, self.state, self.images, self.measuring = setup, log, state, images, measuring
        self.scores: dict[str, Scores] = {}
        self.best: dict[str, float] = {}  # of best.pt: epoch, and knn or, without labels, separation
        self.ranks: dict[str, float | None] = {"rank_features": None, "rank_features_untrained": None}
        self.report_due, self.report_failed = 0.0, False
        # What scores depend on beside the network: those of another classifier or test set are not to be compared.
        self.how_measured = json.dumps([
            setup.config.classifier, setup.config.eval_data, measuring.eval_data and measuring.eval_data.files.fingerprint,
            measuring.chosen_by])

    def state_dict(self) -> State:
        return {"scores": self.scores, "best": self.best, "measured": self.how_measured}

    def load_state_dict(self, state: State) -> None:
        before = f"{self.setup.config.classifier}; {self.measuring.about()['measured_on']}"  # as earlier versions saved it
        if state["measured"] in (self.how_measured, before):
            self.scores = cast(dict[str, Scores], state["scores"])
            untrained = self.scores.get("untrained", {})
            if "separation" in untrained and "retrieval" not in untrained:  # of a run from before there was that score
                del self.scores["untrained"]
            if "separation" in untrained:  # the labels allowed no accuracy
                self.measuring.do_without_labels()
            if (self.setup.folder / "best.pt").exists():
                self.best = cast(dict[str, float], state.get("best", {}))

    def is_complete(self) -> bool:
        """Whether nothing is left to do, as the summary in the run folder says; the same answer in all processes."""
        return self.setup.processes.from_first(
            lambda: self.state.progress.epoch >= self.setup.plan.epochs
            and parse_object(read_text(self.setup.folder / "summary.json")).get("status") == "finished")

    def picture_views(self, batches: Batches) -> None:
        """views.png, of the first images and views that the run trains on."""
        save_views(self.setup.folder / "views.png", self.images, self.setup.plan.views, batches.order.epoch(0)[0],
                   next(batches.epoch(0)))
        self.log.picture(self.state.progress, "views.png")

    def measure_untrained(self) -> None:
        """What the network gives before it has learned anything, and, for images that small, what bare pixels give."""
        asked = self.setup.asked
        if "untrained" not in self.scores:
            self.measure("untrained", self.setup.new_model().online.backbone)
        if self.setup.plan.image_size <= PIXELS_UP_TO and self.measuring.chosen_by == "knn":
            self.measure("pixels", nn.Flatten())
        for option, value in (("--eval-every", asked.eval_every), ("--eval-data", asked.eval_data)):
            if value and not asked.eval:
                self.log.say(f"note: {option} {value} has no effect with --no-eval")

    def measure(self, name: str, backbone: nn.Module) -> None:
        """Scores of `backbone` under `name`, unless it was measured before the run was resumed; with labels or without."""
        scores = None if name in self.scores else self.measuring.measure(backbone)
        if scores is not None:
            self.scores[name] = scores
            self.log.say(f"{name}: " + "  ".join(f"{key} {shown(key, value)}" for key, value in scores.items()
                                                 if value is not None))

    def measure_on_the_way(self) -> None:
        score, progress = self.measuring.chosen_by, self.state.progress
        if score is not None:
            with contextlib.suppress(ValueError):  # a feature is not finite, and the run about to say so
                value = self.measuring.quick(self.state.backbone)
                self.log.record(progress, **{score: value})
                self._keep_best(score, value)
            self.log.start(progress)

    def _keep_best(self, score: str, value: float) -> None:
        """best.pt is the network as it is now, unless one measured before was better; of equals it is the later one."""
        if value >= self.best.get(score, -math.inf):
            self.best = {score: value, "epoch": self.state.progress.epoch}
            self._export("best", **self.best)

    def _export(self, name: str, **about: float) -> None:
        described = {**self.setup.about_backbone(self.state.model), **about}
        export_backbone(self.setup.folder, self.state.backbone.state_dict(), described, name)

    def report_under_way(self) -> None:
        """The facts and report.html as the run goes, to be true whenever someone looks; they never stop the run."""
        began = time.monotonic()
        if began < self.report_due:
            return
        try:
            self._write_facts("running")
            write_report(self.setup.folder, under_way=True)
        except Exception as error:  # also of a file in the run folder that somebody has damaged
            tell = self.log.note if self.report_failed else self.log.say
            tell(f"warning: no report for now: {own_words(error)} - the run goes on")
            self.report_failed = True
        self.report_due = began + max(REPORT_EVERY, 100 * (time.monotonic() - began))
        self.log.start(self.state.progress)

    def finish(self) -> None:
        """Everything that is made of a trained network: export, scores, pictures, summary, report; and the closing lines."""
        self._export("backbone")
        self.measure("trained", self.state.backbone)
        score = self.measuring.chosen_by
        if self.setup.config.eval_every and score is not None:
            value = self.scores.get("trained", {}).get(score)
            if value is not None:
                self._keep_best(score, value)
        if self.setup.config.eval:
            self._picture_features()
        self.write_end("finished")
        self._say()

    def _picture_features(self) -> None:
        setup, images, seed = self.setup, self.images, self.setup.config.seed
        features = partial(embed_data, data=images, recipe=setup.plan.plain, runtime=setup.runtime, workers=setup.workers)
        readable, trained = features(self.state.backbone, indices=some_indices(len(images), PICTURED_AT_MOST))
        _, before = features(setup.new_model().online.backbone, indices=readable)
        labels = None if images.files.labels is None else images.files.labels[readable]
        with self.log.warn_only():
            save_neighbours(setup.folder / "neighbours.png", images, readable, trained, before, seed)
            save_embedding(setup.folder / "embedding.png", trained, labels, images.files.classes, seed)
        self.ranks = {"rank_features": float(effective_rank(trained)),
                      "rank_features_untrained": float(effective_rank(before))}
        self.log.picture(self.state.progress, "neighbours.png", "embedding.png")

    def write_end(self, status: str, reason: str | None = None, error: Exception | None = None) -> None:
        """The facts and report.html, whatever way the run ended. reason: of a run that did not finish; error: if it failed."""
        with self.log.warn_only():
            self._write_facts(status, reason, error)
        with self.log.warn_only():
            write_report(self.setup.folder)
        self.log.close_board()

    def _write_facts(self, status: str, reason: str | None = None, error: Exception | None = None) -> None:
        """summary.json and bad_files.txt."""
        summary = {"status": status, "reason": reason, "error": None if error is None else type(error).__name__,
                   **self._summary()}
        try:
            verdict = replace(read_run(self.setup.folder), summary=summary).verdict
            summary |= dict(zip(VERDICT, (verdict.word, verdict.why, verdict.advice)))
        finally:  # should it fail, the rest is written
            write_json(self.setup.folder / "summary.json", summary)
        self.write_bad_files()

    def write_bad_files(self) -> None:
        """bad_files.txt, where there are any."""
        listing, eval_data = self.images.bad.listing(), self.measuring.eval_data
        if eval_data is not None:
            listing += eval_data.bad.listing(f"{self.setup.config.eval_data}/")
        if listing:
            write_text(self.setup.folder / "bad_files.txt", listing)

    def _summary(self) -> dict[str, object]:
        setup, images, progress, log = self.setup, self.images, self.state.progress, self.log
        eval_data = self.measuring.eval_data
        scores: dict[str, float | None] = {}
        for name, suffix in (("trained", ""), ("untrained", "_untrained"), ("pixels", "_pixels")):
            measured = {"knn": None, "linear": None, **self.scores.get(name, {})}
            scores |= {key + suffix: value for key, value in measured.items()}
        return {
            "images": len(images), "classes": len(images.files.classes),
            "bad_files": len(images.bad.reasons), "bad_eval_files": 0 if eval_data is None else len(eval_data.bad.reasons),
            "epochs": progress.epoch, "updates": progress.updates, "seconds": round(log.seconds, 3),
            "resumed": log.resumed,
            "images_per_second": round(progress.updates * setup.plan.batch_size / max(log.seconds, 1e-9), 2),
            "wait_fraction": round(log.waited / max(log.seconds, 1e-9), 4),
            "loss": log.last.get("loss"), "spread": log.last.get("spread"), **scores, **self.ranks,
            "best_knn": self.best.get("knn"), "best_separation": self.best.get("separation"),
            "best_epoch": self.best.get("epoch"),
            **self.measuring.about(), "world_size": setup.processes.world_size, "device": str(setup.runtime.device),
            "amp": next(name for name, dtype in AMP_DTYPES.items() if dtype == setup.runtime.amp_dtype),
            "peak_memory_mb": round(peak_memory(setup.runtime.device) / 1e6)}

    def _say(self) -> None:
        """The closing lines: what was reached, and how to use it."""
        say, images, folder = self.log.say, self.images, self.setup.folder
        names = [name for name in ("pixels", "untrained", "trained") if name in self.scores]
        if names:
            say(f"{'accuracy' if 'knn' in self.scores[names[-1]] else '':<12}" + "".join(f"{name:>12}" for name in names))
            for key in self.scores[names[-1]]:
                say(f"{key:<12}" + "".join(f"{shown(key, self.scores[name].get(key)):>12}" for name in names))
        if self.setup.config.eval and images.files.labels is None and self.setup.config.eval_data is None:
            say("no class folders, so no accuracy: look at neighbours.png, or pass a labelled folder as --eval-data")
        if images.bad.reasons:
            say(f"skipped {len(images.bad.reasons)} of {len(images)} images (bad_files.txt)")
        with self.log.warn_only():
            verdict = read_run(folder).verdict
            if verdict.word != "starting":  # there are records to judge by
                say(f"{verdict.word}: {verdict.why}" + (f" - {verdict.advice}" if verdict.advice else ""))
        if self.best:
            score, value = next((name, self.best[name]) for name in self.best if name != "epoch")
            say(f"best: {score} {shown(score, value)} after epoch {self.best['epoch']}, in {folder / 'best.pt'}")
        about, recipe = self.setup.about_backbone(self.state.model), self.setup.plan.plain
        say(f"report: {folder / 'report.html'}\nuse it:\n{how_to_load(folder, about)}\n"
            f"# images: RGB in [0, 1] of {recipe.size} pixels, {recipe.scale}")
