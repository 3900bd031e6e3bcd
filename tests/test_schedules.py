"""Schedules: tables of known values, ends, what holds at every step, refusals."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byol_core.schedules import cosine_tau, due, scaled_lr, warmup_cosine

steady = settings(derandomize=True, deadline=None)
STEPS = st.integers(1, 10 ** 9)


# cos is 1, sqrt(3)/2, sqrt(2)/2, 1/2, 0, -1/2, -sqrt(2)/2, -sqrt(3)/2, -1 at these twelfths of pi, so
# tau = 1 - (1 - base) (1 + cos) / 2 can be written down by hand.
@pytest.mark.parametrize(("step", "expected"), [
    (0, 0.996), (200, 0.9962679491924311), (300, 0.9965857864376269), (400, 0.997), (600, 0.998), (800, 0.999),
    (900, 0.9994142135623731), (1000, 0.9997320508075689), (1200, 1.0),
])
def test_cosine_tau_equals_values_worked_out_by_hand(step: int, expected: float) -> None:
    assert cosine_tau(step, 1200, 0.996) == pytest.approx(expected, rel=0, abs=1e-15)


@steady
@given(STEPS, st.floats(0.0, 1.0), st.integers(-10, 2 * 10 ** 9), st.integers(-10, 2 * 10 ** 9))
def test_cosine_tau_begins_at_base_ends_at_one_and_never_decreases(
        max_steps: int, base: float, step: int, other: int) -> None:
    taus = [cosine_tau(at, max_steps, base) for at in sorted([step, step + 1, other])]
    assert [base, *taus, 1.0] == sorted([base, *taus, 1.0])
    assert cosine_tau(0, max_steps, base) == base and cosine_tau(max_steps, max_steps, base) == 1.0


def test_cosine_tau_is_never_below_base_by_rounding() -> None:
    assert 1.0 - (1.0 - 0.1) < 0.1
    assert cosine_tau(1, 10 ** 9, 0.1) == 0.1


@pytest.mark.parametrize(("step", "expected"), [
    (-1, 0.0), (0, 0.0), (5, 0.24), (9, 0.432), (10, 0.48), (30, 0.24 * (1 + math.sqrt(0.5))), (50, 0.24),
    (70, 0.24 * (1 - math.sqrt(0.5))), (90, 0.0), (91, 0.0),
])
def test_warmup_cosine_equals_values_worked_out_by_hand(step: int, expected: float) -> None:
    assert warmup_cosine(step, 90, 10, 0.48) == pytest.approx(expected, rel=1e-14, abs=1e-16)


def test_warmup_cosine_without_warmup_with_nothing_else_and_with_a_last_value() -> None:
    assert warmup_cosine(0, 10, 0, 0.3) == warmup_cosine(-1, 10, 0, 0.3) == warmup_cosine(-1, 1, 0.0, 0.3) == 0.3
    assert [warmup_cosine(step, 2, 2, 1.0, final=0.5) for step in range(3)] == [0.0, 0.5, 0.5]
    assert warmup_cosine(12, 20, 4, 1.0, final=0.1) == pytest.approx(0.55)
    assert warmup_cosine(20, 20, 4, 1.0, final=0.1) == 0.1


@steady
@given(STEPS, st.floats(0.0, 1.0), st.floats(0.0, 10.0), st.integers(-10, 2 * 10 ** 9))
def test_warmup_cosine_stays_between_zero_and_base(max_steps: int, part: float, base: float, step: int) -> None:
    assert 0.0 <= warmup_cosine(step, max_steps, part * max_steps, base) <= base * (1 + 1e-15)


@pytest.mark.parametrize(("schedule", "arguments", "message"), [
    (cosine_tau, (0, 0, 0.99), "max_steps must be positive, got 0"),
    (cosine_tau, (0, -0.5, 0.99), "max_steps must be positive, got -0.5"),
    (cosine_tau, (0, 10, -0.1), r"base must be in \[0, 1\], got -0.1"),
    (cosine_tau, (0, 10, 1.1), r"base must be in \[0, 1\], got 1.1"),
    (cosine_tau, (math.nan, 10, 0.9), "step must be finite, got nan"),
    (cosine_tau, (10**400, 10, 0.9), "step must be finite"),
    (cosine_tau, (0, math.inf, 0.9), "max_steps must be finite, got inf"),
    (cosine_tau, (0, 10, -math.inf), "base must be finite, got -inf"),
    (warmup_cosine, (0, 0, 0, 1.0), "max_steps must be positive, got 0"),
    (warmup_cosine, (0, 10, 11, 1.0), r"warmup_steps must be in \[0, max_steps = 10\], got 11"),
    (warmup_cosine, (0, 10, -1, 1.0), "warmup_steps must be in"),
    (warmup_cosine, (math.nan, 10, 1, 1.0), "step must be finite"),
    (warmup_cosine, (0, 10, 1, math.inf), "base must be finite"),
    (warmup_cosine, (0, 10, 1, 1.0, math.nan), "final must be finite"),
    (scaled_lr, (0.2, 0), "scaled_lr: batch_size must be positive, got 0"),
    (scaled_lr, (0.2, -1), "scaled_lr: batch_size must be positive, got -1"),
    (scaled_lr, (math.nan, 256), "scaled_lr: base must be finite"),
    (due, (1, 0, 10), "every must be at least 1, got 0"),
])
def test_what_no_run_has_is_refused(schedule: Callable[..., object], arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)


@pytest.mark.parametrize(("every", "total", "expected"), [
    (3, 7, [3, 6, 7]), (1, 3, [1, 2, 3]), (10, 4, [4]), (2, 4, [2, 4]),
])
def test_due_on_multiples_and_on_the_last_step(every: int, total: int, expected: list[int]) -> None:
    assert [step for step in range(1, total + 1) if due(step, every, total)] == expected


def test_schedules_return_floats_whatever_they_are_given() -> None:
    assert all(type(cosine_tau(np.int64(step), np.int32(10), np.float32(0.5))) is float for step in (0, 3, 10))
