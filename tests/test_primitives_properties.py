"""Properties of the primitives over shapes, types, tau and module trees."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from byol_core.ema import ema_update
from byol_core.lars import lars_update
from byol_core.losses import alignment, byol_loss, effective_rank, mean_cosine, spread, uniformity
from byol_core.schedules import cosine_tau, due, warmup_cosine

steady = settings(derandomize=True, deadline=None)

UNIT = st.floats(0.0, 1.0)
STEPS = st.integers(1, 10 ** 9)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.complex64])
NAMES = st.sampled_from(["a", "b", "module", "_orig_mod", "weight"])


# A tree is written down as nested lists of (name, shape and type, or a list again), so that two networks can be built
# from the same description with different values.
LEAVES = st.tuples(SHAPES, DTYPES)
TREES = st.recursive(st.dictionaries(NAMES, LEAVES, min_size=1, max_size=3),
                     lambda children: st.dictionaries(NAMES, st.one_of(LEAVES, children), min_size=1, max_size=3),
                     max_leaves=8)


def build(tree: dict, seed: int, wrap: bool = False) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)

    def grow(tree: dict) -> nn.Module:
        module = nn.Module()
        for name, entry in tree.items():
            if isinstance(entry, dict):
                module.add_module(name, grow(entry))
            else:
                shape, dtype = entry
                values = torch.randn(shape, dtype=dtype, generator=generator)
                module.register_parameter(name, nn.Parameter(values))
                module.register_buffer(f"{name}_count", torch.randint(9, (2,), generator=generator))
        return nn.DataParallel(module) if wrap else module
    return grow(tree)


@steady
@given(TREES, UNIT, st.booleans(), st.booleans())
def test_ema_update_follows_the_formula_on_any_tree(tree: dict, tau: float, wrap_one: bool, wrap_other: bool) -> None:
    target, online = build(tree, 0, wrap_one), build(tree, 1, wrap_other)
    before = [param.detach().clone() for param in target.parameters()]
    source = [param.detach().clone() for param in online.parameters()]
    counts = [buffer.clone() for buffer in target.buffers()]
    places = [param.data_ptr() for param in target.parameters()]
    ema_update(target, online, tau)
    for param, old, new in zip(target.parameters(), before, source):
        wide = torch.complex128 if param.dtype.is_complex else torch.float64
        expected = tau * old.to(wide) + (1 - tau) * new.to(wide)
        torch.testing.assert_close(param.detach().to(wide), expected, rtol=1e-6, atol=1e-6)
    assert [param.data_ptr() for param in target.parameters()] == places
    assert all(torch.equal(param, old) for param, old in zip(online.parameters(), source))
    assert all(torch.equal(buffer, old) for buffer, old in zip(target.buffers(), counts))


@steady
@given(TREES, TREES, UNIT)
def test_ema_update_either_fits_or_refuses_and_changes_nothing(tree: dict, other: dict, tau: float) -> None:
    target, online = build(tree, 0), build(other, 1)
    before = [param.detach().clone() for param in target.parameters()]
    sizes = {name: (param.shape, param.dtype) for name, param in online.named_parameters()}
    fits = all(sizes.get(name) == (param.shape, param.dtype) for name, param in target.named_parameters())
    try:
        ema_update(target, online, tau)
    except ValueError:
        assert all(torch.equal(param, old) for param, old in zip(target.parameters(), before))
        assert not fits
    else:
        for name, param in target.named_parameters():  # of the types here, float64 alone holds another, float32
            shape, dtype = sizes[name]
            assert shape == param.shape and (dtype == param.dtype or param.dtype == torch.float64)


EDITS = st.lists(st.tuples(st.sampled_from(["data", "replace", "dtype", "shape", "share", "tie", "drop"]),
                           st.sampled_from(["target", "online", "both"]), st.integers(0, 7)), max_size=4)


def change(module: nn.Module, other: nn.Module, edit: str, number: int) -> None:
    """One edit of a parameter of module, as callers make them between two updates."""
    places = [(owner, name) for owner in module.modules() for name in owner._parameters]
    owner, name = places[number % len(places)]
    param = owner._parameters[name]
    if param is None or edit == "drop":
        owner._parameters[name] = None
    elif edit == "data":
        param.data = torch.full_like(param, 3.0)
    elif edit == "replace":
        owner._parameters[name] = nn.Parameter(torch.full_like(param, 5.0))
    elif edit == "dtype":
        param.data = param.data.to(torch.float64)
    elif edit == "shape":
        param.data = param.data[None]
    elif edit == "share":
        partner = dict(other.named_parameters(remove_duplicate=False)).get(list(
            dict(module.named_parameters(remove_duplicate=False)))[0])
        if partner is not None:
            next(module.parameters()).data = partner.data
    else:
        owner._parameters[name] = next(module.parameters())


@steady
@given(TREES, EDITS)
def test_ema_update_is_right_or_refuses_after_any_edits_between_calls(
        tree: dict, edits: list[tuple[str, str, int]]) -> None:
    target, online = build(tree, 0), build(tree, 1)
    ema_update(target, online, 0.5)
    for edit, side, number in edits:
        if side != "online":
            change(target, online, edit, number)
        if side != "target":
            change(online, target, edit, number)
        if not list(target.parameters()) or not list(online.parameters()):
            return
        before = [param.detach().clone() for param in target.parameters()]
        partners = {name: param.detach().clone() for name, param in online.named_parameters(remove_duplicate=False)}
        names = [name for name, _ in target.named_parameters()]
        try:
            ema_update(target, online, 0.5)
        except ValueError:
            assert all(torch.equal(param, old) for param, old in zip(target.parameters(), before))
            return
        assert {id(param) for param in target.parameters()}.isdisjoint(id(param) for param in online.parameters())
        for name, param, old in zip(names, target.parameters(), before):
            assert partners[name].shape == old.shape
            torch.testing.assert_close(param.detach(), ((old + partners[name]) / 2).to(old.dtype), rtol=1e-6, atol=1e-6)


@steady
@given(TREES, st.floats(allow_nan=True, allow_infinity=True).filter(lambda tau: not 0 <= tau <= 1))
def test_ema_update_refuses_every_tau_outside_0_1(tree: dict, tau: float) -> None:
    target, online = build(tree, 0), build(tree, 1)
    before = [param.detach().clone() for param in target.parameters()]
    try:
        ema_update(target, online, tau)
    except ValueError as error:
        assert "tau must be in [0, 1]" in str(error)
    else:
        raise AssertionError(f"tau {tau} was accepted")
    assert all(torch.equal(param, old) for param, old in zip(target.parameters(), before))


@pytest.mark.slow
@steady
@given(TREES, st.sampled_from(["copy", "average"]))
def test_ema_update_never_averages_integer_buffers(tree: dict, buffers: str) -> None:
    target, online = build(tree, 0), build(tree, 1)
    ema_update(target, online, 0.5, buffers=buffers)  # type: ignore[arg-type]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(target.buffers(), online.buffers()))


@steady
@given(hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-100, 100, width=32)), UNIT,
       st.sampled_from([torch.bfloat16, torch.float16]))
def test_ema_update_of_a_16_bit_network_stays_between_the_two(
        values: np.ndarray, tau: float, dtype: torch.dtype) -> None:
    target, online = nn.Module(), nn.Module()
    target.weight = nn.Parameter(torch.from_numpy(values).clone())
    online.weight = nn.Parameter(torch.ones(len(values), dtype=dtype))
    ema_update(target, online, tau)
    low, high = np.minimum(values, 1.0), np.maximum(values, 1.0)
    moved = target.weight.detach().numpy()
    assert (moved >= low - 1e-5 * abs(low)).all() and (moved <= high + 1e-5 * abs(high)).all()


@steady
@given(STEPS, UNIT, st.integers(-10, 2 * 10 ** 9), st.integers(-10, 2 * 10 ** 9))
def test_cosine_tau_never_decreases_and_stays_between_base_and_one(
        max_steps: int, base: float, one: int, other: int) -> None:
    first, second = cosine_tau(min(one, other), max_steps, base), cosine_tau(max(one, other), max_steps, base)
    assert base <= first <= second <= 1.0


@steady
@given(STEPS, UNIT, st.integers(0, 10 ** 9))
def test_cosine_tau_never_decreases_from_step_to_step(max_steps: int, base: float, step: int) -> None:
    assert cosine_tau(step, max_steps, base) <= cosine_tau(step + 1, max_steps, base)


@steady
@given(STEPS, UNIT, st.floats(0.0, 10.0), st.integers(-10, 2 * 10 ** 9))
def test_warmup_cosine_stays_between_zero_and_base(max_steps: int, part: float, base: float, step: int) -> None:
    value = warmup_cosine(step, max_steps, part * max_steps, base)
    assert 0.0 <= value <= base * (1 + 1e-15)


@steady
@given(st.integers(1, 200), st.integers(1, 50))
def test_due_is_true_once_per_interval_and_at_the_end(total: int, every: int) -> None:
    assert sum(due(step, every, total) for step in range(1, total + 1)) == math.ceil(total / every)


FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
ROWS = st.tuples(st.integers(2, 8), st.integers(1, 6)).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(np.float32, shape, elements=FINITE)] * 2))
FLOATS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@pytest.mark.slow
@steady
@given(ROWS, FLOATS)
def test_byol_loss_is_between_0_and_4_with_a_finite_gradient_for_all_finite_rows(
        rows: tuple[np.ndarray, np.ndarray], dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    p, z = (torch.from_numpy(array).double().clamp(-limit, limit).to(dtype) for array in rows)
    p.requires_grad_()
    loss = byol_loss(p, z)
    loss.backward()
    assert 0.0 <= loss.item() <= 4.0
    assert p.grad is not None and p.grad.isfinite().all()


@pytest.mark.slow
@steady
@given(ROWS)
def test_health_measures_are_finite_and_in_range_for_all_finite_rows(rows: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = (torch.from_numpy(array) for array in rows)
    slack = 1e-5
    assert 0.0 <= spread(a).item() <= 1.0 + slack
    assert 0.0 <= effective_rank(a).item() <= min(len(a) - 1, a.shape[1]) + slack
    assert 0.0 <= alignment(a, b).item() <= 4.0 + slack
    assert -8.0 - slack <= uniformity(a).item() <= slack
    assert -1.0 - slack <= mean_cosine(a).item() <= 1.0 + slack


@steady
@given(st.lists(SHAPES, min_size=1, max_size=4), st.integers(0, 100), UNIT, UNIT, UNIT, st.booleans())
def test_lars_update_equals_the_float64_formula_for_any_shapes(
        shapes: list[tuple[int, ...]], seed: int, momentum: float, trust: float, decay: float, adapt: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    params, grads, buffers = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3))
    expected = []
    for param, grad, buffer in zip(params, grads, buffers):
        p, g, m = param.double(), grad.double(), buffer.double()
        g = g + decay * p
        ratio = trust * p.norm() / g.norm() if adapt and p.norm() > 0 and g.norm() > 0 else 1.0
        expected.append(p - 0.1 * (momentum * m + ratio * g))
    lars_update(params, grads, buffers, lr=0.1, momentum=momentum, weight_decay=decay, trust=trust, adapt=adapt)
    for param, value in zip(params, expected):
        torch.testing.assert_close(param.double(), value, rtol=1e-5, atol=1e-5)
