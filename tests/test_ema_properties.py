"""Properties of ema_update over shapes, types, tau and module trees."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from byol_core.ema import ema_update
from tests.helpers.modules import formula

steady = settings(derandomize=True, deadline=None)

UNIT = st.floats(0.0, 1.0)
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
    ema_update(target, online, tau)
    for param, old, new in zip(target.parameters(), before, source):
        expected = formula(old, new, tau)
        torch.testing.assert_close(param.detach().to(expected.dtype), expected, rtol=1e-6, atol=1e-6)
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
