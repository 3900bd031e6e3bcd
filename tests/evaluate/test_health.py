"""The label-free measures, the verdict on them, and real collapses that it must see; healthy runs that it must not."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from byol_core.evaluate.health import (RANK_COLLAPSED, RANK_COLLAPSING, ROWS, SPREAD_COLLAPSED, SPREAD_COLLAPSING, Verdict,
                                       collapse_advice, find_collapse, judge, measure)
from byol_core.images.digits import write_digits
from byol_core.networks import BYOL
from byol_core.report.curves import CURVES
from byol_core.run.log import RunLog
from byol_core.runtime import Runtime
from byol_core.training import train
from byol_core.views.pixels import ImageData
from tests.helpers.digits import VARIATIONS, Setup, prepared, train_setup
from tests.helpers.pictures import load


def record(number: int, epochs: float = 10.0, **values: float) -> dict[str, float]:
    """Of update 10, 20, ... of a run of 200 updates, learning unless told otherwise."""
    update = 10 * (number + 1)
    return {"update": update, "epoch": epochs * update / 200, "loss": 4.0 - 0.1 * number, "spread": 0.9, "rank": 20.0,
            "rank_limit": 63, "tau": 0.97, **values}


def records(count: int = 20, **values: float) -> list[dict[str, float]]:
    return [record(number, **values) for number in range(count)]


def test_measures_match_values_computed_by_hand() -> None:
    corners = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    found = measure(corners, -corners)
    assert found["spread"] == pytest.approx(1.0)  # each dimension is 1, -1, 0, 0: sqrt(1/2), times sqrt(2)
    assert found["rank"] == pytest.approx(2.0)
    assert found["alignment"] == pytest.approx(4.0)
    assert found["cosine"] == pytest.approx(-1 / 3)  # of 12 ordered pairs 4 are opposite, 8 orthogonal
    assert found["uniformity"] == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))
    assert found["rank_limit"] == 2


def test_measures_of_rows_that_agree() -> None:
    found = measure(torch.ones(8, 4), torch.ones(8, 4))
    assert found == {"spread": 0.0, "rank": 0.0, "alignment": 0.0, "uniformity": 0.0, "cosine": 1.0, "rank_limit": 4}


def test_one_image_with_long_features_is_no_loss_of_rank() -> None:
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    plain = measure(rows, rows)
    rows[5] *= 100
    assert measure(rows, rows) == pytest.approx(plain, rel=1e-5) and plain["rank"] > 14


def test_a_large_batch_costs_no_more_than_its_first_rows() -> None:
    rows = torch.randn(ROWS + 50, 16, dtype=torch.bfloat16)
    changed = rows.clone()
    changed[ROWS:] = 0
    assert measure(rows, rows) == measure(changed, changed)


def test_a_run_that_learns_is_learning() -> None:
    assert judge(records(1), 10).word == "starting"
    assert judge(records(10), 10) == Verdict("learning", "loss 4 to 3.1, spread 0.90, rank 20.0 of 63")
    assert judge([], 10) == Verdict("starting", "nothing recorded yet")
    assert judge([*records(19), record(19, spread=0.01, rank=1.0)], 10).word == "learning"  # one odd batch is no verdict


@pytest.mark.parametrize("values, word", [
    ({"spread": 0.05}, "collapsed"), ({"spread": 0.3}, "collapsing"), ({"rank": 2.0}, "collapsed"),
    ({"rank": 4.0}, "collapsing"), ({"rank": 6.0}, "learning"), ({"spread": 0.5}, "learning"),
    ({"rank": 1.5, "rank_limit": 3}, "learning"),  # 4 images in a batch have 3 dimensions at most
])
def test_collapse_is_seen_in_spread_or_in_rank(values: dict[str, float], word: str) -> None:
    assert judge(records(**values), 100).word == word


def test_the_words_give_the_limits_that_decide() -> None:
    note = next(note for key, _, note, _ in CURVES if key == "rank")
    assert note.endswith(f"a collapse leaves fewer than {RANK_COLLAPSING:g}")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert (f"spread under {SPREAD_COLLAPSING}, under {SPREAD_COLLAPSED}; or effective rank under {RANK_COLLAPSING:g}, under "
            f"{RANK_COLLAPSED:g} (less for small batches), the median of the last three records; a run that ends collapsing "
            "is called collapsed") in readme


def test_nothing_that_moves_is_flat_only_after_a_tenth_of_the_run() -> None:
    still = [record(number, loss=4.0 - 0.001 * number) for number in range(20)]
    verdict = judge(still, 10)
    assert verdict.word == "flat" and "raise --lr" in verdict.advice
    assert judge(still, 1000).word == "learning"  # that is 1 % of such a run: it is warming up
    assert judge(still[:9], 10).word == "learning"


def test_a_target_that_keeps_its_random_start_is_flat() -> None:
    verdict = judge(records(tau=0.9996), 10, "finished")
    assert verdict.word == "flat" and f"{0.9996 ** 200:.0%} of its random start" in verdict.why  # 92 %
    assert "--tau-base" in verdict.advice
    assert judge(records(tau=0.9996), 100).word == "learning"  # before the run is half over it may yet forget


def scores(images: int | None = 1000, **pairs: tuple[float, float]) -> dict[str, object]:
    """A summary with accuracies in percent, before and after."""
    found: dict[str, object] = {"measured_images": images}
    for name, (before, after) in pairs.items():
        found |= {name: after / 100, f"{name}_untrained": before / 100}
    return found


PHOTOS = {"linear": 23.4, "knn": 21.2, "linear_5": 12.4}  # an untrained ResNet-18 on photographs of 64 pixels, 20 classes


@pytest.mark.parametrize("linear, knn, linear_5, word", [
    (25.1, 21.8, 12.3, "nothing learned"),  # 20 epochs in batches of 256
    (26.6, 20.3, 12.4, "nothing learned"),  # in batches of 64
    (26.5, 14.1, 10.2, "worse than untrained"),  # AdamW at a rate of 0.004
    (31.1, 26.6, 16.2, "learned little so far"),  # a faster predictor, larger crops, tau 0.99
    (36.0, 30.0, 18.0, "learned"),
    (23.4, 21.2, 12.4, "nothing learned"),
])
def test_runs_that_were_praised_for_nothing_are_told_the_truth(linear: float, knn: float, linear_5: float, word: str) -> None:
    after = {"linear": linear, "knn": knn, "linear_5": linear_5}
    verdict = judge(records(), 10, "finished", scores(**{name: (PHOTOS[name], after[name]) for name in after}))
    assert verdict.word == word
    assert verdict.why.startswith(f"linear {linear}% (untrained 23.4%), knn {knn}% (untrained 21.2%)")
    assert ("--minutes" in verdict.advice or "train longer" in verdict.advice) == (word != "learned")


@pytest.mark.parametrize("images, measured, word, why", [
    # A gain counts from where a binomial interval ends. On 100 images, 30 right before, the difference has a deviation of 6.0
    # to 6.7 points, and 1.96 of them are 12 to 13.
    (100, {"linear": (30, 43)}, "nothing learned", "chance alone changes them by up to 13.2 points on 100 images"),
    (100, {"linear": (30, 44)}, "learned", ""),
    (100, {"linear": (30, 19)}, "nothing learned", ""),
    (100, {"linear": (30, 18)}, "worse than untrained", ""),
    (10_000, {"linear": (30, 31)}, "nothing learned", ""),
    (10_000, {"linear": (30, 32)}, "learned little so far", ""),
    # What rose and what fell are both told.
    (1000, {"linear": (40, 90), "knn": (40, 30)}, "learned little so far",
     "linear 90.0% (untrained 40.0%), knn 30.0% (untrained 40.0%)"),
    # A tenth of the errors gone is much.
    (10_000, {"linear": (90, 91.1), "knn": (90, 91)}, "learned", ""),
    (10_000, {"linear": (90, 91.1), "knn": (90, 90.8)}, "learned little so far", ""),
    # On 100 images, 97 right before: all right after would still be chance, as 1.96 deviations are 3.3 points.
    (100, {"linear": (97, 100)}, "undecided", "so often that nothing more can be shown"),
    (100, {"linear": (100, 100)}, "undecided", "so often that nothing more can be shown"),
    (100, {"linear": (96, 100)}, "learned", ""),
    (100, {"linear": (100, 90)}, "worse than untrained", ""),
])
def test_what_rose_is_weighed_against_chance_what_fell_and_what_was_left_to_gain(
        images: int, measured: dict[str, tuple[float, float]], word: str, why: str) -> None:
    verdict = judge(records(), 10, "finished", scores(images, **measured))
    assert verdict.word == word and why in verdict.why


@pytest.mark.parametrize("images, word", [(8, "undecided"), (49, "undecided"), (50, "learned"), (None, "learned")])
def test_a_few_images_decide_nothing(images: int | None, word: str) -> None:
    verdict = judge(records(), 10, "finished", scores(images, linear=(50, 90)))
    assert verdict.word == word and verdict.why.startswith(f"{images} images are too few") == (word == "undecided")
    unlabelled = judge(records(), 10, "finished", scores(images, retrieval=(50, 90)))
    assert unlabelled.word == word and ("--eval-data" in unlabelled.advice) is False


@pytest.mark.parametrize("after, word", [(40, "learned"), (13, "learned little so far"), (7, "nothing learned"),
                                         (1, "worse than untrained")])
def test_without_labels_the_retrieval_of_views_decides_beside_the_untrained_network(after: float, word: str) -> None:
    verdict = judge(records(), 9, "finished", scores(256, retrieval=(6, after)) | {
        "separation": 40.0, "separation_untrained": 10.0})  # which rises in any run
    assert verdict.word == word and verdict.why.startswith(f"retrieval {after}.0% (untrained 6.0%)")


def test_a_run_without_labels_that_taught_nothing_is_told_so() -> None:
    """20 epochs of a ResNet-18, of which kNN fell from 23.6 to 19.9 by labels it had not seen (tests/bench/RESULTS.md)."""
    verdict = judge(records(spread=0.72, rank=27.4, rank_limit=127), 20, "finished", scores(
        256, retrieval=(5.37109375, 7.8125)) | {"separation": 37.9, "separation_untrained": 14.4})
    assert verdict.word == "nothing learned" and "up to 4.3 points on 256 images" in verdict.why


def test_a_run_that_was_not_measured_is_undecided() -> None:
    for found in (None, {}, {"linear": None, "knn": None}, {"separation": 40.0, "separation_untrained": 10.0}):
        verdict = judge(records(), 1, "finished", found)
        assert verdict.word == "undecided"
        assert verdict.why.startswith("nothing that decides was measured before and after training; loss 4 ")
    assert judge(records(9, spread=0.3), 1, "finished").word == "collapsed"  # which few records can show


def test_what_to_do_fits_the_run() -> None:
    little = scores(linear=(23.4, 25.1)) | {"seconds": 600.0}
    advice = judge(records(), 10, "finished", little, {"batch_size": 256}).advice
    assert "200 updates were made, 10,000 may do more, about 500 minutes here: --minutes 500" in advice  # 3 s each
    assert "--batch-size 64 makes 4.0 times as many updates" in advice and "--init-from" in advice
    long = [{**record(number), "update": 1000 * (number + 1)} for number in range(20)]
    assert "20,000 updates were made, 80,000 may do more" in judge(long, 10, "finished", little).advice
    assert "--batch-size" not in judge(records(), 10, "finished", little, {"batch_size": 64}).advice
    asked = {"choices": [{"name": name, "asked": asked} for name, asked in (("lr", True), ("wd", False))]}
    assert judge(records(), 10, "finished", little, asked).advice.startswith("leave --lr to the recipe; train longer")


def test_records_without_what_is_judged_are_passed_over() -> None:
    assert judge([{"update": 1, "epoch": 1.0, "loss": 1.0}, {"update": 2, "epoch": 2.0, "knn": 0.5},
                  {"update": 3, "epoch": 2.0, "loss": 1.0, "spread": 0.9}], 2).word == "starting"
    without_rank = [{key: value for key, value in entry.items() if key != "rank"} for entry in records()]
    assert judge(without_rank, 10, "finished").why.endswith("loss 4 to 2.1, spread 0.90")


def test_a_poor_run_whose_target_has_no_memory_is_told_so_first() -> None:
    worse = scores(linear=(80, 80))
    still = [record(number, loss=4.0) for number in range(20)]
    constant = {"tau_base": 0.0, "tau_schedule": "constant"}
    for verdict in (judge(records(), 10, "finished", worse, constant), judge(still, 10, plan=constant)):
        assert verdict.word in ("flat", "nothing learned") and verdict.advice.startswith("raise --tau-base from 0 (")
    for plan in ({**constant, "tau_schedule": "cosine"}, {**constant, "tau_base": 0.99}, None):
        assert "--tau-base" not in judge(records(), 10, "finished", worse, plan).advice


@pytest.mark.parametrize("asked, first", [({"asked": True}, "lower --lr"), ({"asked": False}, "raise --tau-base"),
                                          ({}, "raise --tau-base")])  # the last is of an earlier version
def test_a_learning_rate_that_was_asked_for_is_the_first_suspect(asked: dict[str, bool], first: str) -> None:
    plan = {"tau_base": 0.877, "choices": [{"name": "lr", "value": 0.08, "reason": "as asked", **asked}]}
    advice = collapse_advice(plan)
    assert advice.startswith(first) and "raise --tau-base from 0.877" in advice and "lower --lr" in advice


def test_advice_follows_from_the_numbers_of_the_run() -> None:
    assert "batch" not in collapse_advice({"batch_size": 256, "weight_decay": 1e-6, "tau_base": 0.99})
    assert "larger --batch-size than 64" in collapse_advice({"batch_size": 64})
    assert "--weight-decay" in collapse_advice({"weight_decay": 0.0})
    assert collapse_advice({"tau_base": 0.0}).startswith("raise --tau-base from 0")


def test_a_constant_encoder_is_reported_as_collapsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    log = RunLog(tmp_path, 4, 5, 8)
    constant = nn.Sequential(nn.Flatten(), nn.Threshold(1e9, 1.0), nn.Linear(48, 4))  # whatever the image
    batches = [(torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)) for _ in range(5)]
    train(BYOL(constant, 4, 8, 6), batches, 4, after_step=lambda progress, step: log.step(progress, step, 0.0))
    assert judge(recorded(tmp_path), 4).word == "collapsed"
    assert capsys.readouterr().out.count("features are collapsing: spread 0.000") == 1


def recorded(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    return load(write_digits(tmp_path_factory.mktemp("digits") / "digits")[0], "device")


def faster(times: float) -> Callable[[Setup], None]:
    def change(setup: Setup) -> None:
        setup.plan = replace(setup.plan, lr=setup.plan.lr * times)
    return change


@pytest.mark.slow
@pytest.mark.parametrize("change, epochs, word", [
    (VARIATIONS["as it is"], 4, "undecided"),
    (VARIATIONS["no predictor"], 2, "collapsed"),
    (faster(100), 2, "collapsed"),
    (faster(1e-5), 4, "flat"),
], ids=["healthy", "no predictor", "rate too high", "rate too low"])
def test_verdict_on_a_short_training_on_the_digits(digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                   change: Callable[[Setup], None], epochs: int, word: str) -> None:
    setup = prepared(digits, epochs, change)
    log = RunLog(tmp_path, epochs, setup.plan.updates_per_epoch, setup.plan.batch_size)
    train_setup(setup, digits, Runtime("cpu", channels_last=True), lambda progress, step: log.step(progress, step, 0.0))
    assert judge(recorded(tmp_path), epochs, "finished").word == word
    assert find_collapse(recorded(tmp_path)[:3]) is None or word == "collapsed"
    assert ("features are collapsing" in capsys.readouterr().out) == (word == "collapsed")
