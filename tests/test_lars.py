"""LARS: the published formula, groups, state, and the differences to other implementations."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from byol_core.lars import LARS, parameter_groups

pytestmark = pytest.mark.usefixtures("seeded")
SHAPES = [(4, 3), (2, 3, 3, 3), (5,), (1, 1), ()]


def reference(param: np.ndarray, grads: list[np.ndarray], *, lr: float, momentum: float = 0.9,
              weight_decay: float = 0.0, trust: float = 1e-3, adapt: bool = True) -> np.ndarray:
    """The published steps in float64: decay, ratio of the norms, momentum, rate."""
    velocity = np.zeros_like(param)
    for grad in grads:
        decayed = grad + weight_decay * param
        ratio = 1.0
        if adapt and np.linalg.norm(param) > 0 and np.linalg.norm(decayed) > 0:
            ratio = trust * np.linalg.norm(param) / np.linalg.norm(decayed)
        velocity = momentum * velocity + ratio * decayed
        param = param - lr * velocity
    return param


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], grads: list[list[Tensor]]) -> None:
    for step in grads:
        for param, grad in zip(params, step):
            param.grad = grad.clone()
        optimizer.step()


def make(steps: int, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[list[Tensor]]]:
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    return params, [[torch.randn(shape, dtype=dtype) for shape in SHAPES] for _ in range(steps)]


@pytest.mark.parametrize("options", [
    {"lr": 0.5}, {"lr": 0.5, "weight_decay": 0.1, "trust": 0.02}, {"lr": 3.2, "weight_decay": 1.5e-6},
    {"lr": 0.1, "momentum": 0.0}, {"lr": 0.1, "weight_decay": 0.1, "adapt": False}, {"lr": 0.1, "adapt": False},
    {"lr": 0.5, "trust": 0.0}, {"lr": 0.0, "weight_decay": 0.1},
])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_lars_matches_a_float64_reference_after_several_steps(
        options: dict[str, float], dtype: torch.dtype, tolerance: float) -> None:
    params, grads = make(6, dtype)
    expected = [reference(param.detach().double().numpy(), [step[i].double().numpy() for step in grads], **options)
                for i, param in enumerate(params)]
    run(LARS([{"params": params, **options}], lr=1.0), params, grads)
    for param, value in zip(params, expected):
        np.testing.assert_allclose(param.detach().double().numpy(), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("param", "grad", "expected"), [
    ([0.0, 0.0], [3.0, 4.0], [-3.0, -4.0]), ([3.0, 4.0], [0.0, 0.0], [3.0, 4.0]), ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
    ([], [], []),
])
def test_lars_ratio_is_one_where_a_norm_is_zero(param: list[float], grad: list[float], expected: list[float]) -> None:
    tensor = nn.Parameter(torch.tensor(param))
    run(LARS([tensor], lr=1.0), [tensor], [[torch.tensor(grad)]])
    assert tensor.tolist() == expected


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"weight_decay": 0.0}, {"adapt": False}])
def test_lars_step_leaves_gradients_unchanged_and_parameters_in_place(options: dict[str, float]) -> None:
    params, grads = make(1)
    places = [param.data_ptr() for param in params]
    run(LARS([{"params": params, **options}], lr=1.0), list(params), grads)
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads[0]))  # type: ignore[arg-type]
    assert [param.data_ptr() for param in params] == places


def test_lars_skips_parameters_without_a_gradient() -> None:
    with_grad, without = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([with_grad, without], lr=1.0, weight_decay=1.0)
    with_grad.grad = torch.ones(2, 2)
    optimizer.step()
    assert without.tolist() == [[1.0, 1.0], [1.0, 1.0]] and without not in optimizer.state
    assert with_grad.tolist() != [[1.0, 1.0], [1.0, 1.0]]


def test_lars_serves_groups_of_mixed_types() -> None:
    params = [nn.Parameter(torch.ones(2, 2, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.float32)]
    run(LARS(params, lr=1.0, trust=0.5), list(params), [[torch.ones_like(param) for param in params]])
    for param in params:
        assert param.flatten().tolist() == pytest.approx([0.5] * 4)


def test_lars_state_dict_continues_bit_for_bit() -> None:
    params, grads = make(6)
    twins = copy.deepcopy(params)
    run(LARS(params, lr=0.5, weight_decay=0.1, trust=0.02), list(params), grads)

    first = LARS([{"params": twins, "adapt": True}], lr=0.5, weight_decay=0.1, trust=0.02)
    run(first, list(twins), grads[:3])
    state = copy.deepcopy(first.state_dict())
    resumed = LARS([{"params": twins, "adapt": False}], lr=9.0, momentum=0.0, weight_decay=9.0, trust=9.0)
    resumed.load_state_dict(state)
    run(resumed, list(twins), grads[3:])
    assert all(torch.equal(param, twin) for param, twin in zip(params, twins))


def test_lars_returns_the_closures_loss() -> None:
    param = nn.Parameter(torch.tensor([2.0]))
    optimizer = LARS([param], lr=0.1)

    def closure() -> float:
        loss = (param ** 2).sum()
        loss.backward()
        return loss.item()
    assert optimizer.step(closure) == 4.0
    assert param.grad is not None


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "trust"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "0.1"])
def test_lars_refuses_values_that_are_negative_or_not_finite(name: str, value: object) -> None:
    param = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"LARS: {name} must be a finite Python number, not negative, got {value!r}"):
        LARS([param], **{"lr": 0.1, name: value})
    with pytest.raises(ValueError, match=f"LARS: {name} must be a finite"):
        LARS([{"params": [param], name: value}], lr=0.1)


def test_lars_refuses_sparse_gradients_before_anything_is_written() -> None:
    linear, embedding = nn.Linear(2, 2), nn.Embedding(4, 2, sparse=True)
    optimizer = LARS([*linear.parameters(), *embedding.parameters()], lr=0.1)
    before = linear.weight.detach().clone()
    (linear(embedding(torch.tensor([1])))).sum().backward()
    with pytest.raises(ValueError, match="gradients must be dense"):
        optimizer.step()
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("adapt", ["no", None, 1])
def test_lars_takes_adapt_only_as_a_truth_value(adapt: object) -> None:
    with pytest.raises(ValueError, match="adapt must be True or False"):
        LARS([{"params": [nn.Parameter(torch.zeros(1))], "adapt": adapt}], lr=0.1)


class HostReads(TorchDispatchMode):
    """Fails where a value is read back to the host, which on a GPU would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default,
                            torch.ops.aten.is_nonzero.default), f"{func} reads a value back"
        return func(*args, **(kwargs or {}))


def test_lars_step_reads_nothing_back_to_the_host() -> None:
    params, grads = make(2)
    before = [param.detach().clone() for param in params]
    with HostReads():
        run(LARS(params, lr=0.5, weight_decay=0.1), list(params), grads)
        with pytest.raises(AssertionError, match="reads a value back"):
            bool(params[0].sum() > 0)
    assert not any(torch.equal(*pair) for pair in zip(params, before))


@pytest.mark.gpu
def test_lars_step_does_not_wait_for_the_gpu() -> None:
    params, grads = make(3)
    expected = [reference(param.detach().double().numpy(), [step[i].double().numpy() for step in grads], lr=0.5)
                for i, param in enumerate(params)]
    moved = [nn.Parameter(param.detach().cuda()) for param in params]
    grads = [[grad.cuda() for grad in step] for step in grads]
    optimizer = LARS(moved, lr=0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(optimizer, list(moved), grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for param, value in zip(moved, expected):
        np.testing.assert_allclose(param.detach().cpu().double().numpy(), value, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
def test_lars_step_of_a_16_bit_tensor_is_right_where_a_norm_or_the_ratio_leaves_float16(
        dtype: torch.dtype, weight_decay: float) -> None:
    """|g| = 2e6 is infinite in float16 and the ratio, 2.5e-8, zero there; the step is 0.1 |p| long all the same."""
    param = nn.Parameter(torch.ones(50, 50, dtype=dtype))
    run(LARS([param], lr=100.0, trust=1e-3, weight_decay=weight_decay), [param], [[torch.full_like(param, 4e4)]])
    torch.testing.assert_close(param.detach().float(), torch.full((50, 50), 0.9), rtol=4e-3, atol=0.0)
    assert param.dtype == dtype


# Groups


def network() -> nn.Module:
    """Among its layers a frozen one and one tied to another; a bias of two dimensions, and a scalar."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2),
                           nn.Linear(2, 2).requires_grad_(False), nn.Linear(4, 2, bias=False))
    module[5].weight = module[3].weight
    module.bias, module.temperature = nn.Parameter(torch.zeros(1, 4)), nn.Parameter(torch.zeros(()))
    return module


def test_parameter_groups_keep_biases_and_what_has_one_dimension_apart_and_leave_out_frozen_and_tied() -> None:
    module = network()
    names = {id(param): name for name, param in module.named_parameters()}
    weights, others = parameter_groups(module, 1e-6)
    assert [names[id(param)] for param in weights["params"]] == ["0.weight", "3.weight"]
    assert [names[id(param)] for param in others["params"]] == [
        "bias", "temperature", "0.bias", "1.weight", "1.bias", "3.bias"]
    assert (weights["weight_decay"], weights["adapt"]) == (1e-6, True)
    assert (others["weight_decay"], others["adapt"]) == (0.0, False)


def test_parameter_groups_also_fit_torchs_optimizers() -> None:
    optimizer = torch.optim.SGD(parameter_groups(network(), 1e-4), lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]


# Differences to timm and lightly


def ours(param: nn.Parameter, weight_decay: float) -> torch.optim.Optimizer:
    return LARS([param], lr=1.0, weight_decay=weight_decay, trust=0.1)


def other_timm(param: nn.Parameter, weight_decay: float) -> torch.optim.Optimizer:
    return pytest.importorskip("timm.optim.lars").Lars([param], lr=1.0, weight_decay=weight_decay, trust_coeff=0.1)


def other_lightly(param: nn.Parameter, weight_decay: float) -> torch.optim.Optimizer:
    return pytest.importorskip("lightly.utils.lars").LARS([param], lr=1.0, weight_decay=weight_decay,
                                                          trust_coefficient=0.1)


# The README's table: weight decay, gradient, and the length of the first step from (3, 4), ours and that of the others,
# who take the sum of the norms and stop adapting without weight decay.
STEPS = [(0.1, [0.6, 0.8], 0.5, 0.5), (0.1, [-0.6, -0.8], 0.5, 0.167), (0.1, [0.8, -0.6], 0.5, 0.373),
         (0.0, [0.6, 0.8], 0.5, 1.0)]


@pytest.mark.filterwarnings("ignore")  # the other packages' own
@pytest.mark.parametrize("make_optimizer", [ours, other_timm, other_lightly])
def test_lars_differs_from_others_as_the_readme_says(
        make_optimizer: Callable[[nn.Parameter, float], torch.optim.Optimizer]) -> None:
    for weight_decay, grad, own, others in STEPS:
        param = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        run(make_optimizer(param, weight_decay), [param], [[torch.tensor(grad, dtype=torch.float64)]])
        assert math.dist(param.tolist(), (3.0, 4.0)) == pytest.approx(own if make_optimizer is ours else others, abs=5e-4)
