"""LARS: the published formula, groups, state, and the differences to other implementations."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from byol_core.lars import LARS, lars_update, parameter_groups

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


def test_lars_step_equals_values_worked_out_by_hand() -> None:
    # |p| = 5, g' = (0, 2) + 0.5 (3, 4) = (1.5, 4), |g'|^2 = 18.25; then m = 0.1 * 5 / |g'| * g', p -= 2 m
    param = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = LARS([param], lr=2.0, weight_decay=0.5, trust=0.1)
    param.grad = torch.tensor([[0.0, 2.0]])
    optimizer.step()
    ratio = 0.1 * 5 / math.sqrt(18.25)
    assert param.tolist()[0] == pytest.approx([3 - 2 * ratio * 1.5, 4 - 2 * ratio * 4.0])


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


def test_lars_update_is_what_the_optimizer_does() -> None:
    params, grads = make(3)
    values, buffers = [param.detach().clone() for param in params], [torch.zeros_like(param) for param in params]
    for step in grads:
        lars_update(values, step, buffers, lr=0.5, momentum=0.9, weight_decay=0.1, trust=0.02, adapt=True)
    run(LARS(params, lr=0.5, weight_decay=0.1, trust=0.02), list(params), grads)
    assert all(torch.equal(param, value) for param, value in zip(params, values))


def test_lars_without_adaptation_equals_torchs_sgd() -> None:
    params, grads = make(5)
    twins = copy.deepcopy(params)
    run(LARS([{"params": params, "adapt": False}], lr=0.1, momentum=0.9, weight_decay=0.01), list(params), grads)
    run(torch.optim.SGD(twins, lr=0.1, momentum=0.9, weight_decay=0.01), list(twins), grads)
    for param, twin in zip(params, twins):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-7)


def test_lars_adaptation_does_not_depend_on_weight_decay() -> None:
    """Other implementations stop adapting where weight decay is zero."""
    param = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    run(LARS([param], lr=1.0, weight_decay=0.0, trust=0.1), [param], [[torch.tensor([[0.0, 2.0]])]])
    assert param.tolist()[0] == pytest.approx([3.0, 3.5])  # 0.1 * 5 / 2 * 2


def test_lars_step_does_not_depend_on_the_gradients_scale() -> None:
    params, grads = make(1)
    twins = copy.deepcopy(params)
    run(LARS(params, lr=1.0), list(params), grads)
    run(LARS(twins, lr=1.0), list(twins), [[1000 * grad for grad in grads[0]]])
    for param, twin in zip(params, twins):
        torch.testing.assert_close(param, twin)


@pytest.mark.parametrize(("param", "grad", "expected"), [
    ([0.0, 0.0], [3.0, 4.0], [-3.0, -4.0]), ([3.0, 4.0], [0.0, 0.0], [3.0, 4.0]), ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
])
def test_lars_ratio_is_one_where_a_norm_is_zero(param: list[float], grad: list[float], expected: list[float]) -> None:
    tensor = nn.Parameter(torch.tensor(param))
    run(LARS([tensor], lr=1.0), [tensor], [[torch.tensor(grad)]])
    assert tensor.tolist() == expected


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"weight_decay": 0.0}, {"adapt": False}])
def test_lars_step_leaves_gradients_unchanged(options: dict[str, float]) -> None:
    params, grads = make(1)
    run(LARS([{"params": params, **options}], lr=1.0), list(params), grads)
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads[0]))  # type: ignore[arg-type]


def test_lars_keeps_the_parameters_storage() -> None:
    params, grads = make(2)
    before = [param.data_ptr() for param in params]
    run(LARS(params, lr=1.0), list(params), grads)
    assert [param.data_ptr() for param in params] == before


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


def test_lars_state_dict_names_every_number() -> None:
    params, grads = make(1)
    optimizer = LARS(params, lr=0.5, momentum=0.8, weight_decay=0.1, trust=0.02)
    run(optimizer, list(params), grads)
    group, = optimizer.state_dict()["param_groups"]
    assert group == {"lr": 0.5, "momentum": 0.8, "weight_decay": 0.1, "trust": 0.02, "adapt": True,
                     "params": list(range(len(params)))}
    assert all(list(state) == ["momentum_buffer"] for state in optimizer.state_dict()["state"].values())


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


class HostReads(TorchDispatchMode):
    """Fails where a value is read back to the host, which on a GPU would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default,
                            torch.ops.aten.is_nonzero.default), f"{func} reads a value back"
        return func(*args, **(kwargs or {}))


def test_host_reads_are_noticed() -> None:
    with HostReads(), pytest.raises(AssertionError, match="reads a value back"):
        bool(torch.ones(1) > 0)


def test_lars_step_reads_nothing_back_to_the_host() -> None:
    params, grads = make(2)
    before = [param.detach().clone() for param in params]
    with HostReads():  # whatever reads raises
        run(LARS(params, lr=0.5, weight_decay=0.1), list(params), grads)
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
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_parameter_groups_exclude_biases_and_one_dimensional_tensors() -> None:
    module = network()
    names = {id(param): name for name, param in module.named_parameters()}
    weights, others = parameter_groups(module, 1e-6)
    assert [names[id(param)] for param in weights["params"]] == ["0.weight", "3.weight"]
    assert [names[id(param)] for param in others["params"]] == ["0.bias", "1.weight", "1.bias", "3.bias"]
    assert (weights["weight_decay"], weights["adapt"]) == (1e-6, True)
    assert (others["weight_decay"], others["adapt"]) == (0.0, False)


def test_parameter_groups_exclude_biases_of_any_rank_and_scalars() -> None:
    module = nn.Module()
    module.bias = nn.Parameter(torch.zeros(1, 4))
    module.temperature = nn.Parameter(torch.zeros(()))
    module.table = nn.Parameter(torch.zeros(2, 2))
    weights, others = parameter_groups(module, 0.1)
    assert weights["params"] == [module.table]
    assert len(others["params"]) == 2


def test_parameter_groups_leave_out_frozen_and_repeat_no_tied_parameter() -> None:
    module = network()
    module[0].requires_grad_(False)
    module.append(nn.Linear(4, 2, bias=False))
    module[-1].weight = module[3].weight
    weights, others = parameter_groups(module, 0.1)
    assert len(weights["params"]) == 1 and len(others["params"]) == 3


def test_parameter_groups_drive_lars_as_published() -> None:
    module = network()
    before = {name: param.detach().clone() for name, param in module.named_parameters()}
    optimizer = LARS(parameter_groups(module, 0.1), lr=0.5, trust=0.02)
    for param in module.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    for name, param in module.named_parameters():
        assert param.grad is not None
        adapted = {"weight_decay": 0.1, "adapt": True} if param.ndim > 1 else {"weight_decay": 0.0, "adapt": False}
        value = reference(before[name].double().numpy(), [param.grad.double().numpy()], lr=0.5, trust=0.02, **adapted)
        np.testing.assert_allclose(param.detach().numpy(), value, rtol=1e-5, atol=1e-6)


def test_parameter_groups_also_fit_torchs_optimizers() -> None:
    optimizer = torch.optim.SGD(parameter_groups(network(), 1e-4), lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]


# Differences to timm and lightly


def other_timm(param: nn.Parameter, weight_decay: float) -> torch.optim.Optimizer:
    return pytest.importorskip("timm.optim.lars").Lars([param], lr=1.0, weight_decay=weight_decay, trust_coeff=0.1)


def other_lightly(param: nn.Parameter, weight_decay: float) -> torch.optim.Optimizer:
    return pytest.importorskip("lightly.utils.lars").LARS([param], lr=1.0, weight_decay=weight_decay,
                                                          trust_coefficient=0.1)


def first_step(make_optimizer: Callable[[nn.Parameter, float], torch.optim.Optimizer], weight_decay: float,
               grad: list[float]) -> float:
    """Length of the first step from (3, 4)."""
    param = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    run(make_optimizer(param, weight_decay), [param], [[torch.tensor(grad, dtype=torch.float64)]])
    return math.dist(param.tolist(), (3.0, 4.0))


def ours(param: nn.Parameter, weight_decay: float) -> torch.optim.Optimizer:
    return LARS([param], lr=1.0, weight_decay=weight_decay, trust=0.1)


def test_lars_takes_the_norm_of_the_sum() -> None:
    # |p| = 5, trust 0.1: every step is 0.5 long
    assert first_step(ours, 0.1, [-0.6, -0.8]) == pytest.approx(0.5)
    assert first_step(ours, 0.1, [0.6, 0.8]) == pytest.approx(0.5)
    assert first_step(ours, 0.0, [0.6, 0.8]) == pytest.approx(0.5)


@pytest.mark.filterwarnings("ignore")  # the other packages' own
@pytest.mark.parametrize("other", [other_timm, other_lightly])
def test_others_take_the_sum_of_the_norms_and_stop_adapting_without_weight_decay(
        other: Callable[[nn.Parameter, float], torch.optim.Optimizer]) -> None:
    # g' = g + 0.1 p has norm 0.5 for the opposed gradient; |g| + 0.1 |p| = 1.5: 0.1 * 5 / 1.5 * 0.5
    assert first_step(other, 0.1, [-0.6, -0.8]) == pytest.approx(0.5 / 3, rel=1e-6)
    assert first_step(other, 0.1, [0.6, 0.8]) == pytest.approx(0.5, rel=1e-6)
    assert first_step(other, 0.0, [0.6, 0.8]) == pytest.approx(1.0)  # plain gradient of length 1


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
