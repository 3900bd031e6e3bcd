"""What a run folder says of its run: its files, whichever exist, read so that no damage to them stops a report."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byol_core.evaluate.health import Verdict, judge

SECTIONS = ("config", "commands", "plan", "data", "versions")  # of config.json
VERDICT = ("verdict", "verdict_why", "verdict_advice")  # of summary.json, as it was when that was written
TEXTS = ("status", "reason", "error", "measured_on", "device", "amp", *VERDICT)  # of summary.json; all else in it are numbers
MEASURED = ("knn", "separation")  # before training, on the way, and after it
SCORES = {"knn": "k nearest neighbours, all labels", "linear": "linear probe, all labels",
          "linear_5": "linear probe, 5 labels per class", "linear_1": "linear probe, 1 label per class"}
LARGEST = 1e300  # beyond it a number is damage, and overflows in a drawing


def shown(score: str, value: float | None) -> str:
    """A score for people to read: in percent, but separation, which has no end."""
    return "-" if value is None else f"{value:.2f}" if score == "separation" else f"{value:.1%}"


@dataclass(frozen=True)
class RunFacts:
    """summary: numbers, texts, or None for what is not known; updates and epochs are from summary.json or from the records,
    whichever is later.

    config: its sections, {} for one that is absent. choices: with name, value, reason and, if the run kept it, asked.
    records: lines of metrics.jsonl, of which only numbers are kept. resumed: epochs at which a new session began.
    skipped: lines of bad_files.txt.
    """

    folder: Path
    summary: dict[str, Any]
    config: dict[str, dict[str, Any]]
    choices: list[dict[str, Any]]
    records: list[dict[str, float]]
    resumed: list[float]
    skipped: list[str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def plan(self) -> dict[str, Any]:
        return self.config["plan"]

    @property
    def status(self) -> str:
        """ "running", "stopped", "failed" or "finished"; "unknown" when nothing says that it ended."""
        return self.summary["status"] or "unknown"

    @property
    def verdict(self) -> Verdict:
        return judge(self.records, self.plan.get("epochs") or 0, self.status, self.summary,
                     {**self.plan, "choices": self.choices})

    @property
    def skips(self) -> list[float]:
        """Epochs at which the float16 scaler skipped steps."""
        return [record["epoch"] for before, record in zip([{}, *self.records], self.records)
                if record.get("skipped", 0) > before.get("skipped", record.get("skipped", 0) if before else 0)]

    def recorded(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) of every record that has it."""
        return [(record["epoch"], record[key]) for record in self.records if key in record]

    def points(self, key: str) -> list[tuple[float, float]]:
        """What is to be drawn: to what is measured on the way belongs what was measured before and after."""
        found = self.recorded(key)
        if key in MEASURED and found:
            before, after = self.summary.get(f"{key}_untrained"), self.summary.get(key)
            found = [*([(0.0, before)] if before is not None else []), *found]
            if after is not None and self.summary["epochs"] > found[-1][0]:
                found.append((float(self.summary["epochs"]), after))
        return found


def read_run(folder: Path, under_way: bool = False) -> RunFacts:
    """The facts of the run in `folder`.

    under_way: it is the run itself that asks. Others cannot tell whether one that calls itself running was cut off.
    """
    config = parse_object(read_text(folder / "config.json"))
    sections = {name: config[name] if isinstance(config.get(name), dict) else {} for name in SECTIONS}
    listed = config["choices"] if isinstance(config.get("choices"), list) else []
    choices = [choice for choice in listed if isinstance(choice, dict) and choice.keys() >= {"name", "value", "reason"}]
    records = [numbers for numbers in map(_numbers, read_text(folder / "metrics.jsonl").splitlines())
               if numbers.keys() >= {"update", "epoch"}]  # else the line that a killed run was writing
    per_epoch = sections["plan"].get("updates_per_epoch") or 1
    written = parse_object(read_text(folder / "summary.json"))
    at = written["resumed"] if isinstance(written.get("resumed"), list) else []  # runs of earlier versions do not tell
    resumed = [update / per_epoch for update in at if _is_number(update)]
    summary = _brought_up_to_date(written, records, under_way)
    return RunFacts(folder, summary, sections, choices, records, resumed, read_text(folder / "bad_files.txt").splitlines())


def _brought_up_to_date(summary: Mapping[str, Any], records: list[dict[str, float]], under_way: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        key: value if (isinstance(value, str) if key in TEXTS else _is_number(value)) else None
        for key, value in {"status": None, "updates": None, "epochs": None, **summary}.items()}
    last = records[-1] if records else {"update": 0, "epoch": 0}
    went_on = found["updates"] is not None and found["updates"] < last["update"]  # since the summary was written
    if went_on or found["updates"] is None or found["epochs"] is None:
        found |= {"updates": int(last["update"]), "epochs": int(last["epoch"])}
    if went_on and not summary["updates"]:
        found |= dict.fromkeys(("seconds", "images_per_second", "wait_fraction"))  # of no update yet
    if went_on or found["status"] == "running" and not under_way:
        found |= {"status": None, "reason": None}
    return found


def _numbers(line: str) -> dict[str, float]:
    return {key: value for key, value in parse_object(line).items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < LARGEST  # NaN is not


def read_text(path: Path) -> str:
    """"" for a file that is absent or cannot be read."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that `text` is; {} where it is none, or cut off."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
