"""What the caller changes between two calls of ema_update: nothing is remembered from the first to the second."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from byol_core.ema import ema_update
from tests.helpers.modules import assert_refused, formula, net

pytestmark = pytest.mark.usefixtures("seeded")


CHANGES = {
    "modules": "target[2][1], online[0] = nn.Linear(3, 2), nn.Linear(4, 3)",
    "the dictionary": "online[0]._parameters = {name: nn.Parameter(param + 1.0) for name, param in "
                      "reversed(online[0]._parameters.items())}",
    "names": "online[0].bias, online[1].bias = online[1].bias, online[0].bias",  # the same tensors under each other's
    "requires_grad": "online.requires_grad_(False)\ntarget[0].requires_grad_(False)",
    "a narrower online": "online.bfloat16()",
    "assigned": "target.load_state_dict(net().state_dict(), assign=True)",
    "storage": "with torch.no_grad():\n"
               "    online[0].weight.set_(torch.full((40,), 3.0).untyped_storage(), 5, (3, 4), (4, 1))",
    "sizes": "for module in (target, online):\n    module[0].weight.requires_grad_(False).resize_(2, 4)",
    "layers more": "for module in (target, online):\n    module.append(nn.Linear(2, 2))",
    "a wrapper": "online[2] = nn.DataParallel(online[2])",
    "transposed": "for module in (target, online):\n    module[0].weight.data = module[0].weight.data.T",
}
REFUSED = {
    "target[0].weight.data = online[0].weight.data": "share parameter '0.weight'",
    "target[2] = online[2]": "share parameter '2.1.weight'",
    "online[0].weight.data = online[0].weight.data.view(4, 3)": "'0.weight' has shape",
    "online[0].weight.requires_grad_(False).resize_(2, 4)": "'0.weight' has shape",
    "online[0].weight.untyped_storage().resize_(0)": "holds no memory",
    "target.bfloat16()": "small steps round away",
    "online.double()": "does not hold",
    "online.to('meta')": "online's on meta",
    "target[0].weight.data = torch.zeros(4).expand(3, 4)": "is expanded",
    "target[1].bias = target[0].bias": "target ties parameter '0.bias'",
    "online[0].register_parameter('bias', None)": "'0.bias' has no partner",
    "online[2] = nn.ModuleDict({'inner': online[2]})": "'2.1.weight' has no partner",
}


def change(code: str, target: nn.Module, online: nn.Module) -> None:
    exec(code, {"torch": torch, "nn": nn, "net": net, "target": target, "online": online})


def paired(target: nn.Module, online: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Target's tensors with online's of the same name, by torch's own listing."""
    partners = {name.replace("module.", ""): param for name, param in online.named_parameters(remove_duplicate=False)}
    return [(param, partners[name]) for name, param in target.named_parameters()]


@pytest.mark.parametrize("what", CHANGES)
def test_ema_update_sees_what_changed_between_two_calls(what: str) -> None:
    target, online = net(), net()
    ema_update(target, online, 0.5)
    change(CHANGES[what], target, online)
    expected = [formula(mine, theirs, 0.5) for mine, theirs in paired(target, online)]
    ema_update(target, online, 0.5)
    for (mine, _), value in zip(paired(target, online), expected):
        torch.testing.assert_close(mine.detach().double(), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("code", REFUSED)
def test_ema_update_refuses_what_stopped_fitting_between_two_calls(code: str) -> None:
    target, online = net(), net()
    ema_update(target, online, 0.5)
    change(code, target, online)
    assert_refused(target, online, REFUSED[code])


def test_ema_update_keeps_no_network_alive() -> None:
    target, online = net(), net()
    ema_update(target, online, 0.5, buffers="average")
    watched = [weakref.ref(thing) for thing in (target, online, target[0].weight, online[2][1].weight)]
    del target, online
    gc.collect()
    assert all(reference() is None for reference in watched)


def test_ema_update_leaves_nothing_on_modules_and_parameters() -> None:
    target, online = net(), net()
    things = [*target.modules(), *target.parameters(), *online.modules(), *online.parameters()]
    attributes = [set(vars(thing)) for thing in things]
    ema_update(target, online, 0.5)
    assert [set(vars(thing)) for thing in things] == attributes
