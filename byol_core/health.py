"""Is it learning? Label-free measures of a batch, and what they say in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from torch import Tensor, nn

from byol_core.losses import alignment, effective_rank, mean_cosine, spread, uniformity

ROWS = 128  # of a batch that are measured; the singular values of more cost more than they tell
RECENT = 3  # records judged together, so that one odd batch is not a verdict
SPREAD_COLLAPSED, SPREAD_COLLAPSING = 0.1, 0.4  # a healthy run stays well above 0.5
RANK_COLLAPSED, RANK_COLLAPSING = 3.0, 5.0  # dimensions in use; the digits use 13 to 54 of 63 while they are learned
FLAT_CHANGE = 0.05  # less than this share of change in loss, spread and rank since the start is no change
FLAT_RECORDS, FLAT_SHARE = 10, 0.1  # records, and share of the run, before it may be called flat
SCORES = ("linear", "knn", "linear_5", "linear_1")  # accuracies that decide together, where they were measured
FEW_MEASURED = 50  # images; on fewer, one deviation of an accuracy near 50 % is seven points and more
RISEN = 0.01  # an accuracy that rose by less may have done so by chance: on a few hundred images that is one deviation
SMALL_TAU = 0.9  # the smallest of the paper's that came close to the best
REMEMBERED = 0.5  # share of its random start that a target may still hold when half the run is over

Record = Mapping[str, float]  # a line of metrics.jsonl


@dataclass(frozen=True)
class Verdict:
    """word: "starting", "learning", "flat", "collapsing", "collapsed", "finished well" or "undecided".

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
    return isinstance(choices, (list, tuple)) and any((choice["name"], choice["reason"]) == (name, "as asked")
                                                      for choice in choices)


def judge(records: Sequence[Record], epochs: int, status: str = "running", scores: Mapping[str, object] | None = None,
          plan: Mapping[str, object] | None = None) -> Verdict:
    """The verdict on a run from its records, in the order they were made.

    epochs: of the whole run. status: "running", "stopped", "failed" or "finished". scores: the summary, of which the
    accuracies before and after are used. plan: the run's resolved numbers, for advice that fits them.
    """
    records = [record for record in records if record.keys() >= {"loss", "spread", "tau"}]
    if not records:
        return Verdict("starting", "nothing recorded yet")
    collapse = find_collapse(records, plan)
    if collapse is not None:
        return Verdict("collapsed", collapse.why, collapse.advice) if status == "finished" else collapse
    verdict = _unmoved(records, epochs) or _remembering(records, epochs)
    if verdict is None:
        verdict = _finished(records, scores or {}) if status == "finished" else _learning(records)
    if verdict.word == "flat" and (plan or {}).get("tau_schedule") == "constant":
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


def _finished(records: Sequence[Record], scores: Mapping[str, object]) -> Verdict:
    pairs = [(name, _number(scores.get(name)), _number(scores.get(f"{name}_untrained"))) for name in SCORES]
    pairs = [(name, after, before) for name, after, before in pairs if math.isfinite(after) and math.isfinite(before)]
    told = ", ".join(f"{name} {after:.1%} (untrained {before:.1%})" for name, after, before in pairs)
    if pairs and (measured := _number(scores.get("measured_images"))) < FEW_MEASURED:
        return Verdict("undecided", f"{measured:.0f} images are too few to measure on: {told}; {_state(records)}",
                       "give a larger labelled folder as --eval-data")
    if sum(after - before for _, after, before in pairs) > 0:
        return Verdict("finished well", f"{told}; {_state(records)}")
    if any(after - before >= RISEN for _, after, before in pairs):
        return Verdict("undecided", f"some accuracies rose, others fell: {told}", "train for more epochs")
    separated, before = (_number(scores.get(name)) for name in ("separation", "separation_untrained"))
    if separated < (1 - FLAT_CHANGE) * before and len(records) >= FLAT_RECORDS:
        return Verdict("flat", f"separation {separated:.2f} (untrained {before:.2f}): an untrained network tells images apart "
                       "better", "train for more epochs; where that does not help, lower --lr by 3 to 10 times")
    if pairs:
        return Verdict("flat", f"on the whole no better than untrained: {told}", "train for more epochs; look at views.png: "
                       "what the views do not keep is not learned (the paper: crops alone 59.4, all views 72.5)")
    if separated > before:
        return Verdict("finished well", f"separation {separated:.2f} (untrained {before:.2f}); {_state(records)}")
    if separated <= before:
        return Verdict("undecided", f"separation {separated:.2f} (untrained {before:.2f}); {_state(records)}",
                       "train for more epochs")
    if len(records) < FLAT_RECORDS:
        return Verdict("undecided", f"{len(records)} records are too few to judge by; {_state(records)}",
                       "train for more epochs")
    return Verdict("finished well", _state(records))


def _learning(records: Sequence[Record]) -> Verdict:
    if len(records) < RECENT:
        return Verdict("starting", "too early to tell")
    return Verdict("learning", _state(records))


def _state(records: Sequence[Record]) -> str:
    first, last = records[0], records[-1]
    rank = f", rank {last['rank']:.1f} of {last['rank_limit']:.0f}" if last.keys() >= {"rank", "rank_limit"} else ""
    return f"loss {first['loss']:.3g} to {last['loss']:.3g}, spread {last['spread']:.2f}{rank}"


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
