"""Schedules: tables of known values, ends, refusals."""

import math
from collections.abc import Callable

import pytest

from byol_core.schedules import cosine_tau, due, scaled_lr, warmup_cosine

NOT_FINITE = [math.nan, math.inf, -math.inf]


# cos is 1, sqrt(3)/2, sqrt(2)/2, 1/2, 0, -1/2, -sqrt(2)/2, -sqrt(3)/2, -1 at these twelfths of pi, so
# tau = 1 - (1 - base) (1 + cos) / 2 can be written down by hand.
@pytest.mark.parametrize(("step", "expected"), [
    (0, 0.996), (200, 0.9962679491924311), (300, 0.9965857864376269), (400, 0.997), (600, 0.998), (800, 0.999),
    (900, 0.9994142135623731), (1000, 0.9997320508075689), (1200, 1.0),
])
def test_cosine_tau_equals_values_worked_out_by_hand(step: int, expected: float) -> None:
    assert cosine_tau(step, 1200, 0.996) == pytest.approx(expected, rel=0, abs=1e-15)


@pytest.mark.parametrize("base", [0.0, 0.1, 0.9, 0.97, 0.99, 0.996, 0.9995, 1.0])
@pytest.mark.parametrize("max_steps", [1, 2, 7, 1000, 312_500])
def test_cosine_tau_equals_the_published_formulas(base: float, max_steps: int) -> None:
    for step in {0, 1, 2, 3, max_steps // 3, max_steps // 2, max_steps - 1, max_steps}:
        if step <= max_steps:
            reference = 1 - (1 - base) * (math.cos(math.pi * step / max_steps) + 1) / 2
            assert cosine_tau(step, max_steps, base) == pytest.approx(reference, rel=0, abs=2e-16)
            decayed = 0.5 * (1 + math.cos(math.pi * min(step, max_steps) / max_steps))  # the form of DeepMind's code
            assert cosine_tau(step, max_steps, base) == pytest.approx(1 - (1 - base) * decayed, rel=0, abs=2e-16)


def test_cosine_tau_equals_lightlys_schedule_of_one_step_more() -> None:
    """lightly reaches the end one step early: it divides by max_steps - 1."""
    other = pytest.importorskip("lightly.utils.scheduler").cosine_schedule
    for step in range(101):
        assert cosine_tau(step, 100, 0.99) == pytest.approx(other(step, 101, 0.99, 1.0), rel=0, abs=1e-15)


@pytest.mark.parametrize("base", [0.0, 0.1, 0.3, 0.9, 0.996, 0.9995, 1.0])
def test_cosine_tau_runs_from_base_to_one(base: float) -> None:
    taus = [cosine_tau(step, 1000, base) for step in range(-2, 1003)]
    assert taus[:3] == [base] * 3 and taus[-3:] == [1.0] * 3
    assert all(before <= after for before, after in zip(taus, taus[1:]))
    assert all(base <= tau <= 1.0 for tau in taus)


def test_cosine_tau_is_never_below_base_by_rounding() -> None:
    assert 1.0 - (1.0 - 0.1) < 0.1
    assert cosine_tau(1, 10 ** 9, 0.1) == 0.1


def test_cosine_tau_of_a_single_step_still_moves_the_target() -> None:
    assert cosine_tau(0, 1, 0.99) == 0.99


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", ["step", "max_steps", "base"])
def test_cosine_tau_refuses_what_is_not_finite(name: str, value: float) -> None:
    arguments = {"step": 1.0, "max_steps": 10.0, "base": 0.5, name: value}
    with pytest.raises(ValueError, match=f"{name} must be finite, got {value}"):
        cosine_tau(**arguments)


@pytest.mark.parametrize(("step", "expected"), [
    (-1, 0.0), (0, 0.0), (5, 0.24), (9, 0.432), (10, 0.48), (30, 0.24 * (1 + math.sqrt(0.5))), (50, 0.24),
    (70, 0.24 * (1 - math.sqrt(0.5))), (90, 0.0), (91, 0.0),
])
def test_warmup_cosine_equals_values_worked_out_by_hand(step: int, expected: float) -> None:
    assert warmup_cosine(step, 90, 10, 0.48) == pytest.approx(expected, rel=1e-14, abs=1e-16)


def test_warmup_cosine_without_warmup_starts_at_base() -> None:
    assert warmup_cosine(0, 10, 0, 0.3) == 0.3


def test_warmup_cosine_may_warm_up_to_the_end() -> None:
    assert [warmup_cosine(step, 2, 2, 1.0, final=0.5) for step in range(3)] == [0.0, 0.5, 0.5]


def test_warmup_cosine_ends_at_final() -> None:
    assert warmup_cosine(20, 20, 4, 1.0, final=0.1) == 0.1
    assert warmup_cosine(12, 20, 4, 1.0, final=0.1) == pytest.approx(0.55)


@pytest.mark.parametrize(("schedule", "arguments", "message"), [
    (cosine_tau, (0, 0, 0.99), "max_steps must be positive, got 0"),
    (cosine_tau, (0, -1, 0.99), "max_steps must be positive, got -1"),
    (cosine_tau, (0, -0.5, 0.99), "max_steps must be positive, got -0.5"),
    (cosine_tau, (0, 10, -0.1), r"base must be in \[0, 1\], got -0.1"),
    (cosine_tau, (0, 10, 1.1), r"base must be in \[0, 1\], got 1.1"),
    (warmup_cosine, (0, 0, 0, 1.0), "max_steps must be positive, got 0"),
    (warmup_cosine, (0, 10, 11, 1.0), r"warmup_steps must be in \[0, max_steps = 10\], got 11"),
    (warmup_cosine, (0, 10, -1, 1.0), "warmup_steps must be in"),
    (warmup_cosine, (math.nan, 10, 1, 1.0), "step must be finite"),
    (warmup_cosine, (0, 10, 1, math.inf), "base must be finite"),
    (warmup_cosine, (0, 10, 1, 1.0, math.nan), "final must be finite"),
    (due, (1, 0, 10), "every must be at least 1, got 0"),
])
def test_what_no_run_has_is_refused(schedule: Callable[..., object], arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)


def test_scaled_lr_follows_the_published_presets() -> None:
    assert scaled_lr(0.2, 4096) == pytest.approx(3.2)  # 1000 epochs in the paper
    assert scaled_lr(0.45, 256) == 0.45


@pytest.mark.parametrize(("base", "batch_size"), [(0.2, 0), (0.2, -1), (math.nan, 256), (math.inf, 256)])
def test_scaled_lr_refuses(base: float, batch_size: int) -> None:
    with pytest.raises(ValueError, match="scaled_lr"):
        scaled_lr(base, batch_size)


@pytest.mark.parametrize(("every", "total", "expected"), [
    (3, 7, [3, 6, 7]), (1, 3, [1, 2, 3]), (10, 4, [4]), (2, 4, [2, 4]),
])
def test_due_on_multiples_and_on_the_last_step(every: int, total: int, expected: list[int]) -> None:
    assert [step for step in range(1, total + 1) if due(step, every, total)] == expected


def test_schedules_return_floats_whatever_they_are_given() -> None:
    import numpy as np
    assert type(cosine_tau(np.int64(3), np.int32(10), np.float32(0.5))) is float
    with pytest.raises(ValueError, match="step must be finite"):
        cosine_tau(10**400, 10, 0.9)
