"""Is it learning? Label-free measures of a batch, and what they say in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from torch import Tensor, nn

from byol_core.losses import alignment, effective_rank, mean_cosine, spread, uniformity

ROWS = 128  # of a batch that are measured; the singular values of more add time, not information
RECENT = 3  # records judged together, so that one odd batch is not a verdict
SPREAD_COLLAPSED, SPREAD_COLLAPSING = 0.1, 0.4  # a healthy run stays well above 0.5
RANK_COLLAPSED, RANK_COLLAPSING = 3.0, 5.0  # dimensions in use; the digits use 13 to 54 of 63 while they are learned
FLAT_CHANGE = 0.05  # less than this share of change in loss, spread and rank since the start is no change
FLAT_RECORDS, FLAT_SHARE = 10, 0.1  # records, and share of the run, before it may be called flat
SCORES = ("linear", "knn", "linear_5", "linear_1")  # accuracies that decide together, where they were measured
FEW_MEASURED = 50  # images; on fewer, one deviation of an accuracy near 50 % is seven points and more
UNKNOWN_MEASURED = 500  # images, where a summary does not say on how many it rests
CERTAIN = 1.96  # standard deviations of a difference that chance exceeds once in twenty times
LEARNED = 0.1  # share of the untrained network's errors that are gone, on average, where much was learned
LONGER, ENOUGH_UPDATES, SMALL_BATCH = 4, 10_000, 64  # what is advised where little was learned
RATES = ("optimizer", "lr", "predictor_lr", "weight_decay", "tau_base", "tau_schedule", "scheduler", "warmup_epochs",
         "crop_scale")
LONGEST = 1e6  # minutes that are worth advising
OWN_NETWORKS = ("conv4", "conv6")  # whose weights torchvision does not have
SMALL_TAU = 0.9  # the smallest of the paper's that came close to the best
REMEMBERED = 0.5  # share of its random start that a target may still hold when half the run is over

POOR = ("nothing learned", "worse than untrained")

Record = Mapping[str, float]  # a line of metrics.jsonl


@dataclass(frozen=True)
class Verdict:
    """word: "starting", "learning", "flat", "collapsing" or "collapsed"; of a finished run "learned", "learned little so far",
    "nothing learned", "worse than untrained" or "undecided".

    why: the numbers that say so. advice: what to do next, empty where nothing is wrong.
    """

    word: str
    why: str
    advice: str = ""


def measure(view1: Tensor, view2: Tensor) -> dict[str, float]:
    """The label-free measures of two projections (B, D) of the same images, on their first 128 rows, on the CPU.

    Returns: spread (healthy near 1, collapsed 0), rank and the most it could be, alignment of the two views (0 to 4),
    uniformity (lower is better) and mean cosine between different images (healthy near 0, collapsed 1). All are of the
    normalised rows, which alone the loss sees: a single image of 60 times the others' length makes the rank of plain rows 5,
    where it is 16.
    """
    first, second = (view[:ROWS].float().cpu() for view in (view1, view2))
    measures = {"spread": spread(first), "rank": effective_rank(nn.functional.normalize(first)),
                "alignment": alignment(first, second), "uniformity": uniformity(first), "cosine": mean_cosine(first)}
    rows, dimensions = first.shape
    return {name: round(float(value), 7) for name, value in measures.items()} | {"rank_limit": min(rows - 1, dimensions)}


def find_collapse(records: Sequence[Record], plan: Mapping[str, object] | None = None) -> Verdict | None:
    """A verdict when the latest records show a collapse, complete (all images alike) or dimensional (few directions left).

    plan: the run's resolved numbers, for advice that fits them.
    """
    recent = [record for record in records[-RECENT:] if "spread" in record]
    if not recent:
        return None
    spread_now = median(record["spread"] for record in recent)
    rank_now = median(record.get("rank", math.inf) for record in recent)
    rank_limit = recent[-1].get("rank_limit", math.inf)
    for word, spread_floor, rank_floor, share in (("collapsed", SPREAD_COLLAPSED, RANK_COLLAPSED, 0.1),
                                                  ("collapsing", SPREAD_COLLAPSING, RANK_COLLAPSING, 0.15)):
        if spread_now < spread_floor:
            return Verdict(word, f"spread {spread_now:.3f}, a healthy run stays near 1: different images look alike to the "
                           "network", collapse_advice(plan or {}))
        if rank_now < min(rank_floor, share * rank_limit):
            return Verdict(word, f"rank {rank_now:.1f}, of {rank_limit:.0f} possible: the features use hardly any "
                           "dimensions", collapse_advice(plan or {}))
    return None


def collapse_advice(plan: Mapping[str, object]) -> str:
    """What most likely causes a collapse in a run with these numbers, by the paper's ablations (Grill et al. 2020).

    A learning rate that was asked for comes first, else the target momentum, where it is small.
    """
    lower_lr, raise_tau = ["lower --lr by 3 to 10 times"], _raise_tau(plan)
    advice = lower_lr + raise_tau if _asked_for("lr", plan) else raise_tau + lower_lr
    batch, decay = (_number(plan.get(name)) for name in ("batch_size", "weight_decay"))
    if batch < 128:
        advice.append(f"use a larger --batch-size than {batch:.0f} (the paper: 64 costs 12 points against 256)")
    if decay == 0:
        advice.append("set --weight-decay (the paper: 0 diverges)")
    if len(advice) == 1:
        advice.append("lengthen --warmup-epochs")
    return "; ".join(advice) + "; in code of your own, check that the predictor is there and that the target gets no gradient"


def _raise_tau(plan: Mapping[str, object]) -> list[str]:
    tau = _number(plan.get("tau_base"))
    return [f"raise --tau-base from {tau:.3g} (the paper: 0 collapses, 0.9 costs 4 points against 0.99)"
            ] if tau < SMALL_TAU else []


def _asked_for(name: str, plan: Mapping[str, object]) -> bool:
    """Whether a choice of the plan was made by the user."""
    choices = plan.get("choices")
    return isinstance(choices, (list, tuple)) and any(choice["name"] == name and choice.get("asked") for choice in choices)


def judge(records: Sequence[Record], epochs: int, status: str = "running", scores: Mapping[str, object] | None = None,
          plan: Mapping[str, object] | None = None) -> Verdict:
    """The verdict on a run from its records, in the order they were made.

    epochs: of the whole run. status: "running", "stopped", "failed" or "finished". scores: the summary, of which the
    accuracies before and after, the number of images that they rest on and the seconds are used. plan: the run's resolved
    numbers, for advice that fits them.
    """
    records = [record for record in records if record.keys() >= {"update", "loss", "spread", "tau"}]
    if not records:
        return Verdict("starting", "nothing recorded yet")
    collapse = find_collapse(records, plan)
    if collapse is not None:
        return Verdict("collapsed", collapse.why, collapse.advice) if status == "finished" else collapse
    verdict = _unmoved(records, epochs) or _remembering(records, epochs)
    if verdict is None:
        early = len(records) < RECENT
        learning = Verdict("starting", "too early to tell") if early else Verdict("learning", _state(records))
        verdict = _finished(records, scores or {}, plan or {}) if status == "finished" else learning
    if verdict.word in ("flat", *POOR) and (plan or {}).get("tau_schedule") == "constant":
        return replace(verdict, advice="; ".join([*_raise_tau(plan or {}), verdict.advice]))
    return verdict


def _unmoved(records: Sequence[Record], epochs: int) -> Verdict | None:
    """Flat because nothing changes: the learning rate is too low."""
    if len(records) < FLAT_RECORDS or records[-1]["epoch"] < FLAT_SHARE * epochs:
        return None
    for name in ("loss", "spread", "rank"):
        start, *_ = values = [record[name] for record in records if name in record] or [0.0]
        now = sum(values[-RECENT:]) / len(values[-RECENT:])
        if abs(now - start) > FLAT_CHANGE * abs(start):
            return None
    return Verdict("flat", f"loss {records[-1]['loss']:.3g}, spread and rank are where they began",
                   "raise --lr, or shorten --warmup-epochs (the paper: 34.8 at a rate of 0.01, 72.5 at 0.3, 69.4 at 1.0)")


def _remembering(records: Sequence[Record], epochs: int) -> Verdict | None:
    """Flat because the target hardly moves: what it holds of its random start is the product of all tau."""
    if records[-1]["epoch"] < 0.5 * epochs:
        return None
    updates = [0.0, *(record["update"] for record in records)]
    held = math.prod(record["tau"] ** (now - before) for before, now, record in zip(updates, updates[1:], records))
    if held < REMEMBERED:
        return None
    return Verdict("flat", f"after {updates[-1]:.0f} updates the target still holds {held:.0%} of its random start",
                   "lower --tau-base, train for more epochs, or use a smaller --batch-size for more updates (the paper: a "
                   "target that never moves reaches 18.8 instead of 72.5)")


@dataclass(frozen=True)
class _Gain:
    """An accuracy before and after training, measured on so many images."""

    name: str
    before: float
    after: float
    images: float

    @property
    def chance(self) -> float:
        """By how much the two may differ for no reason: 1.96 standard deviations of a difference of two binomial shares."""
        return _chance(self.before, self.after, self.images)

    @property
    def has_room(self) -> bool:
        """Whether any accuracy at all would be higher by more than chance allows."""
        return 1 - self.before > _chance(self.before, 1.0, self.images)

    @property
    def points(self) -> float:
        return self.after - self.before

    @property
    def share(self) -> float:
        """Of the errors made before, those that are gone."""
        return self.points / max(1 - self.before, 0.01)

    def __str__(self) -> str:
        return f"{self.name} {self.after:.1%} (untrained {self.before:.1%})"


def _chance(before: float, after: float, images: float) -> float:
    return CERTAIN * math.sqrt((before * (1 - before) + after * (1 - after)) / images)


def _gains(scores: Mapping[str, object], names: Sequence[str]) -> list[_Gain]:
    """Those of the accuracies that were measured before and after."""
    images = _number(scores.get("measured_images"))
    images = images if images > 0 else UNKNOWN_MEASURED
    pairs = [(name, _number(scores.get(f"{name}_untrained")), _number(scores.get(name))) for name in names]
    return [_Gain(name, before, after, images) for name, before, after in pairs if 0 <= before <= 1 and 0 <= after <= 1]


def _finished(records: Sequence[Record], scores: Mapping[str, object], plan: Mapping[str, object]) -> Verdict:
    gains = _gains(scores, SCORES) or _gains(scores, ["retrieval"])
    if not gains:
        why = f"nothing that decides was measured before and after training; {_state(records)}"
        return Verdict("undecided", why, "measure it with python -m byol_core.evaluate, on labelled images")
    told, images = ", ".join(map(str, gains)), _number(scores.get("measured_images"))
    if 0 < images < FEW_MEASURED:
        return Verdict("undecided", f"{images:.0f} images are too few to measure on: {told}; {_state(records)}",
                       "give more labelled images as --eval-data" if gains[0].name in SCORES else "train on more images")
    higher = [gain for gain in gains if gain.points > gain.chance]
    lower = [gain for gain in gains if -gain.points > gain.chance]
    allowed = max(gain.chance for gain in gains)
    on = f"on {images:,.0f} images" if math.isfinite(images) else "on so many images"
    why = f"{told}; chance alone changes them by up to {100 * allowed:.1f} points {on}; {_state(records)}"
    if lower and not higher:
        slower = _back_to_the_recipe(plan) or ["lower --lr by 3 to 10 times"]
        return Verdict("worse than untrained", why, "; ".join([*slower, *_more(records, scores, plan)]))
    if not any(gain.has_room for gain in gains):
        return Verdict("undecided", f"an untrained network is right so often that nothing more can be shown: {why}",
                       "measure on images that are harder to tell apart, as --eval-data")
    if not higher:
        return Verdict("nothing learned", why, "; ".join([*_back_to_the_recipe(plan), *_more(records, scores, plan)]))
    if lower or sum(gain.share for gain in gains) < LEARNED * len(gains):
        return Verdict("learned little so far", why, "; ".join(_more(records, scores, plan)))
    return Verdict("learned", why)


def _back_to_the_recipe(plan: Mapping[str, object]) -> list[str]:
    asked = [name for name in RATES if _asked_for(name, plan)]
    flags = ["--min-scale" if name == "crop_scale" else "--" + name.replace("_", "-") for name in asked]
    return [f"leave {' and '.join(flags)} to the recipe"] if asked else []


def _more(records: Sequence[Record], scores: Mapping[str, object], plan: Mapping[str, object]) -> list[str]:
    """What gives more in a run that did not go wrong: updates, and better weights to begin with."""
    updates, seconds, batch = records[-1]["update"], _number(scores.get("seconds")), _number(plan.get("batch_size"))
    wanted = max(LONGER * updates, ENOUGH_UPDATES)
    minutes = wanted / max(updates, 1) * seconds / 60
    long = f", about {minutes:.0f} minutes here: --minutes {minutes:.0f}" if 1 <= minutes <= LONGEST else ""
    advice = [f"train longer: {updates:,.0f} updates were made, {wanted:,.0f} may do more{long}"]
    if batch > SMALL_BATCH and updates < ENOUGH_UPDATES:
        advice.append(f"--batch-size {SMALL_BATCH} makes {batch / SMALL_BATCH:.1f} times as many updates of the same images, "
                      "which in short runs may count for more than the size of the batch")
    arch = plan.get("arch", "")
    other = "--no-small-stem " if arch in OWN_NETWORKS or plan.get("small_stem") else ""
    other = f"--arch resnet18 {other}" if arch in OWN_NETWORKS else other
    return [*advice, f"or begin with weights that exist: {other}--init-from a file of torchvision's for that network"]


def _state(records: Sequence[Record]) -> str:
    first, last = records[0], records[-1]
    rank = f", rank {last['rank']:.1f} of {last['rank_limit']:.0f}" if last.keys() >= {"rank", "rank_limit"} else ""
    return f"loss {first['loss']:.3g} to {last['loss']:.3g}, spread {last['spread']:.2f}{rank}"


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 else math.nan
