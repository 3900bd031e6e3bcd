"""What the caller changes between two calls of ema_update: nothing is remembered from the first to the second."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from byol_core.ema import ema_update
from tests.helpers.modules import assert_refused, formula, net

pytestmark = pytest.mark.usefixtures("seeded")


def swap_data(target: nn.Module, online: nn.Module) -> None:
    target[0].weight.data = torch.full((3, 4), 5.0)
    online[0].weight.data = torch.full((3, 4), 7.0)


def replace_module(target: nn.Module, online: nn.Module) -> None:
    target[2][1], online[0] = nn.Linear(3, 2), nn.Linear(4, 3)


def replace_parameter(target: nn.Module, online: nn.Module) -> None:
    del online[0].weight
    online[0].weight = nn.Parameter(torch.full((3, 4), 7.0))
    target[0]._parameters["bias"] = nn.Parameter(torch.full((3,), 7.0))


def replace_dictionary(target: nn.Module, online: nn.Module) -> None:
    online[0]._parameters = {name: nn.Parameter(param + 1.0) for name, param in reversed(online[0]._parameters.items())}


def exchange_layers(target: nn.Module, online: nn.Module) -> None:
    """The same tensors under each other's names."""
    online[0].bias, online[1].bias = online[1].bias, online[0].bias


def freeze(target: nn.Module, online: nn.Module) -> None:
    online.requires_grad_(False)
    target[0].requires_grad_(False)


def widen(target: nn.Module, online: nn.Module) -> None:
    target.double()


def narrow(target: nn.Module, online: nn.Module) -> None:
    online.bfloat16()


def assign(target: nn.Module, online: nn.Module) -> None:
    target.load_state_dict(net().state_dict(), assign=True)


def move_storage(target: nn.Module, online: nn.Module) -> None:
    with torch.no_grad():
        online[0].weight.set_(torch.full((40,), 3.0).untyped_storage(), 5, (3, 4), (4, 1))


def resize_both(target: nn.Module, online: nn.Module) -> None:
    for module in (target, online):
        module[0].weight.requires_grad_(False).resize_(2, 4)


def tie_both(target: nn.Module, online: nn.Module) -> None:
    for module in (target, online):
        module[1].bias = module[0].bias


def grow_both(target: nn.Module, online: nn.Module) -> None:
    for module in (target, online):
        module.append(nn.Linear(2, 2))


def wrap_inside(target: nn.Module, online: nn.Module) -> None:
    online[2] = nn.DataParallel(online[2])


def transpose_both(target: nn.Module, online: nn.Module) -> None:
    for module in (target, online):
        module[0].weight.data = module[0].weight.data.T


CHANGES = [swap_data, replace_module, replace_parameter, replace_dictionary, exchange_layers, freeze, widen, narrow,
           assign, move_storage, resize_both, tie_both, grow_both, wrap_inside, transpose_both]


def paired(target: nn.Module, online: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Target's tensors with online's of the same name, by torch's own listing."""
    partners = {name.replace("module.", ""): param for name, param in online.named_parameters(remove_duplicate=False)}
    return [(param, partners[name]) for name, param in target.named_parameters()]


@pytest.mark.parametrize("change", CHANGES)
def test_ema_update_sees_what_changed_between_two_calls(change: Callable[[nn.Module, nn.Module], None]) -> None:
    target, online = net(), net()
    ema_update(target, online, 0.5)
    change(target, online)
    expected = [formula(mine, theirs, 0.5) for mine, theirs in paired(target, online)]
    ema_update(target, online, 0.5)
    for (mine, _), value in zip(paired(target, online), expected):
        torch.testing.assert_close(mine.detach().double(), value, rtol=1e-6, atol=1e-6)


def share_data(target: nn.Module, online: nn.Module) -> None:
    target[0].weight.data = online[0].weight.data


def share_module(target: nn.Module, online: nn.Module) -> None:
    target[2] = online[2]


def reshape_one(target: nn.Module, online: nn.Module) -> None:
    online[0].weight.data = online[0].weight.data.view(4, 3)


def resize_one(target: nn.Module, online: nn.Module) -> None:
    online[0].weight.requires_grad_(False).resize_(2, 4)


def free_one(target: nn.Module, online: nn.Module) -> None:
    online[0].weight.untyped_storage().resize_(0)


def narrow_target(target: nn.Module, online: nn.Module) -> None:
    target.bfloat16()


def widen_online(target: nn.Module, online: nn.Module) -> None:
    online.double()


def move_away(target: nn.Module, online: nn.Module) -> None:
    online.to("meta")


def expand_target(target: nn.Module, online: nn.Module) -> None:
    target[0].weight.data = torch.zeros(4).expand(3, 4)


def tie_target(target: nn.Module, online: nn.Module) -> None:
    target[1].bias = target[0].bias


def drop_one(target: nn.Module, online: nn.Module) -> None:
    online[0].register_parameter("bias", None)


def wrap_unknown(target: nn.Module, online: nn.Module) -> None:
    online[2] = nn.ModuleDict({"inner": online[2]})


@pytest.mark.parametrize(("change", "message"), [
    (share_data, "share parameter '0.weight'"), (share_module, "share parameter '2.1.weight'"),
    (reshape_one, "'0.weight' has shape"), (resize_one, "'0.weight' has shape"), (free_one, "holds no memory"),
    (narrow_target, "small steps round away"), (widen_online, "does not hold"), (move_away, "online's on meta"),
    (expand_target, "is expanded"), (tie_target, "target ties parameter '0.bias'"),
    (drop_one, "'0.bias' has no partner"), (wrap_unknown, "'2.1.weight' has no partner"),
])
def test_ema_update_refuses_what_stopped_fitting_between_two_calls(
        change: Callable[[nn.Module, nn.Module], None], message: str) -> None:
    target, online = net(), net()
    ema_update(target, online, 0.5)
    change(target, online)
    assert_refused(target, online, message)


def test_ema_update_keeps_no_network_alive() -> None:
    target, online = net(), net()
    ema_update(target, online, 0.5, buffers="average")
    watched = [weakref.ref(thing) for thing in (target, online, target[0].weight, online[2][1].weight)]
    del target, online
    gc.collect()
    assert all(reference() is None for reference in watched)


def test_ema_update_leaves_the_networks_as_copyable_and_picklable_as_before() -> None:
    target, online = net(), net()
    attributes = [set(vars(module)) for module in (*target.modules(), *online.modules())]
    ema_update(target, online, 0.5)
    assert [set(vars(module)) for module in (*target.modules(), *online.modules())] == attributes
    twin = copy.deepcopy(target)
    expected = formula(target[0].weight, online[0].weight, 0.5).float()
    ema_update(twin, online, 0.5)
    torch.testing.assert_close(twin[0].weight.detach(), expected)
    assert not torch.equal(target[0].weight, twin[0].weight)
