"""Device and precision choices, and the step that may be refused."""

import pytest
import torch
from torch import nn

from byol_core.runtime import NonFiniteError, Runtime, choose_device, choose_precision


def patch_cuda(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.parametrize("capability, dtype", [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_auto_precision_is_what_the_gpu_multiplies_natively(monkeypatch, capability: tuple[int, int], dtype) -> None:
    patch_cuda(monkeypatch, capability)
    assert choose_precision("auto", torch.device("cuda"))[0] is dtype


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, None)])
def test_auto_precision_on_a_cpu_is_bf16_only_where_native(monkeypatch, native: bool, dtype) -> None:
    monkeypatch.setattr("byol_core.runtime._cpu_multiplies_bf16", lambda: native)
    assert choose_precision("auto", torch.device("cpu"))[0] is dtype
    assert choose_precision("auto", torch.device("cpu"), tiny=True)[0] is None


@pytest.mark.parametrize("asked, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", None)])
def test_precision_is_as_asked(asked: str, dtype) -> None:
    assert choose_precision(asked, torch.device("cpu")) == (dtype, "as asked")


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="has an accelerator")
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


def test_a_step_applies_the_gradient_and_clears_it() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    runtime = Runtime()
    loss = model(torch.tensor([[3.0]])).sum()
    runtime.backward(loss)
    assert runtime.step(optimizer, loss.detach()) is True
    assert model.weight.item() == -0.5 and model.weight.grad is None


def test_channels_last_keeps_values_and_changes_layout() -> None:
    view = torch.rand(2, 3, 4, 4)
    placed = Runtime("cpu", channels_last=True).place(view)
    assert torch.equal(placed, view) and placed.is_contiguous(memory_format=torch.channels_last)
