"""Device and precision choices, and the step that may be refused."""

import pytest
import torch
from torch import nn

from byol_core import runtime as runtime_module
from byol_core.lars import LARS
from byol_core.runtime import NonFiniteError, Runtime, allow_tf32, choose_device, choose_precision, prefers_channels_last


@pytest.mark.parametrize("capability, dtype", [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_auto_precision_is_what_the_gpu_multiplies_natively(monkeypatch, capability: tuple[int, int], dtype) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_precision("auto", torch.device("cuda"))[0] is dtype


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, None)])
def test_auto_precision_on_a_cpu_is_bf16_only_where_native(monkeypatch, native: bool, dtype) -> None:
    monkeypatch.setattr(runtime_module, "_cpu_multiplies_bf16", lambda: native)
    assert choose_precision("auto", torch.device("cpu"))[0] is dtype
    assert choose_precision("auto", torch.device("cpu"), "resnet18")[0] is dtype
    for arch in ("conv6", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x1_0"):
        assert choose_precision("auto", torch.device("cpu"), arch)[0] is None


def test_a_gpu_chosen_by_number_becomes_torchs_current_one(monkeypatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device("cuda:1") == (torch.device("cuda", 1), "as asked") and current == [torch.device("cuda", 1)]


@pytest.mark.parametrize("asked, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", None)])
def test_precision_is_as_asked(asked: str, dtype) -> None:
    assert choose_precision(asked, torch.device("cpu")) == (dtype, "as asked")


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="has an accelerator")
@pytest.mark.parametrize("device, amp_dtype, arch, expected", [
    ("cuda", None, "resnet18", True), ("cpu", torch.bfloat16, "resnet18", True), ("cpu", None, "conv6", True),
    ("cpu", None, "resnet18", False), ("cpu", None, "densenet121", True), ("mps", torch.float16, "densenet121", False)])
def test_channels_come_last_where_that_is_faster(device: str, amp_dtype: torch.dtype | None, arch: str,
                                                 expected: bool) -> None:
    assert prefers_channels_last(torch.device(device), amp_dtype, arch) is expected


def test_without_an_accelerator_auto_is_the_cpu_and_others_are_refused() -> None:
    assert choose_device("auto") == (torch.device("cpu"), "no CUDA found")
    for asked in ("cuda", "cuda:3", "mps", "xpu", "nonsense"):
        with pytest.raises(ValueError, match=f"--device {asked}"):
            choose_device(asked)


@pytest.mark.parametrize("amp_dtype, dtype", [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_autocast_uses_the_precision(amp_dtype, dtype) -> None:
    with Runtime("cpu", amp_dtype).autocast():
        assert nn.Linear(2, 2)(torch.rand(2, 2)).dtype is dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_gradient_refuses_the_whole_step(bad: float) -> None:
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.weight.grad[1, 2] = bad
    with pytest.raises(NonFiniteError):
        Runtime().step(optimizer, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_channels_last_keeps_values_and_changes_layout() -> None:
    view = torch.rand(2, 3, 4, 4)
    placed = Runtime("cpu", channels_last=True).place(view)
    assert torch.equal(placed, view) and placed.is_contiguous(memory_format=torch.channels_last)


OPTIMIZERS = {
    "lars": lambda parameters: LARS([{"params": parameters, "adapt": True}], lr=0.5, weight_decay=1e-2),
    "lars on biases": lambda parameters: LARS([{"params": parameters, "adapt": False}], lr=0.5, weight_decay=1e-2),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.5, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.5, fused=True),
}


def steps_until_refused(optimizer: torch.optim.Optimizer, weight: nn.Parameter, runtime: Runtime) -> list[torch.Tensor]:
    """The weight after each of three steps, the last of which has an infinite gradient; the fourth is refused."""
    weights = []
    for gradient in ([1.0, -2.0], [0.5, 3.0], [1.0, torch.inf], [1.0, 1.0]):
        weight.grad = torch.tensor([gradient])
        runtime.step(optimizer, torch.tensor(1.0))
        weights.append(weight.detach().clone())
    return weights


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_infinite_gradient_noticed_late_has_changed_nothing(name: str) -> None:
    """As on CUDA, where the host does not wait; the steps before are those of a host that does."""
    weights = []
    for late in (False, True):
        weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
        optimizer = OPTIMIZERS[name]([weight])
        runtime = Runtime()
        runtime.reads_late = late
        with pytest.raises(NonFiniteError) as caught:
            steps_until_refused(optimizer, weight, runtime)
        assert caught.value.late is late
        weights.append(weight.detach().clone())
        for value in optimizer.state[weight].values():
            assert value is None or torch.isfinite(value).all()
    assert torch.equal(*weights) and not torch.equal(weights[0], torch.tensor([[1.0, 2.0]]))


def test_an_optimizer_that_cannot_skip_on_the_device_is_waited_for() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    optimizer = torch.optim.RMSprop([weight], lr=0.5)
    runtime = Runtime()
    runtime.reads_late = True
    with pytest.raises(NonFiniteError) as caught:
        steps_until_refused(optimizer, weight, runtime)
    assert not caught.value.late and torch.isfinite(weight).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_on_cuda_does_not_wait_for_the_device(name: str) -> None:
    model = nn.Linear(8, 8).cuda()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    runtime = Runtime("cuda", torch.bfloat16)
    images = torch.randn(4, 8, device="cuda")
    for number in range(4):
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first step is waited for
        try:
            with runtime.autocast():
                loss = model(images).square().mean()
            runtime.backward(loss)
            assert runtime.step(optimizer, loss.detach())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    runtime.confirm()


@pytest.mark.parametrize("capability, allowed", [((8, 0), True), ((7, 5), False)])
def test_tf32_is_allowed_where_the_gpu_has_it(capability: tuple[int, int], allowed: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    before = torch.get_float32_matmul_precision()
    try:
        assert allow_tf32(torch.device("cuda")) == allowed and not allow_tf32(torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == ("high" if allowed else before)
    finally:
        torch.set_float32_matmul_precision(before)
