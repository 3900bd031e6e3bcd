"""Forward and backward as a CUDA graph: on a CPU with what stands in for one, on a GPU with the real thing."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from byol_core import cuda_graph
from byol_core.cuda_graph import WARM_UP, Recorded
from byol_core.lars import LARS
from byol_core.networks import BYOL
from byol_core.runtime import Runtime
from byol_core.training import Progress, Step, train
from tests.helpers.forking import REPOSITORY
from tests.helpers.modules import small_backbone

CPU = torch.device("cpu")


class OnCpu:
    """Stands in for a graph: recording changes nothing, and each replay writes into the outputs of the recording."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recordings = self.replays = 0

    def __call__(self, work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        self.recordings += 1
        (recorded,) = (cell.cell_contents for cell in work.__closure__  # type: ignore[attr-defined]
                       if isinstance(cell.cell_contents, Recorded))
        changed = [*self.model.buffers(), *(p.grad for p in self.model.parameters() if p.grad is not None)]
        before = [tensor.clone() for tensor in changed]
        generator = torch.get_rng_state()
        work()
        torch.set_rng_state(generator)
        outputs = recorded._outputs
        for tensor, value in zip(changed, before):
            tensor.copy_(value)
        for output in outputs:
            output.fill_(torch.nan)  # nothing was computed

        def replay() -> None:
            self.replays += 1
            work()
            for output, value in zip(outputs, recorded._outputs):
                output.copy_(value)
            recorded._outputs = outputs

        return replay


def new_model(device: torch.device = CPU) -> BYOL:
    """With batch norm, and dropout, which draws at each step."""
    torch.manual_seed(0)
    model = BYOL(nn.Sequential(small_backbone(), nn.Dropout(0.2)), 4, hidden_dim=8, out_dim=6)
    return model.to(device)


def batches_of(number: int, device: torch.device = CPU) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.rand(2, 4, 3, 8, 8, generator=generator).to(device).unbind(0)) for _ in range(number)]  # type: ignore


def trained(graph: bool, *, amp: torch.dtype | None = None, accum_steps: int = 1, device: torch.device = CPU,
            optimizer: str = "sgd", batches: list[tuple[Tensor, Tensor]] | None = None, channels_last: bool = False,
            then_evaluated: bool = False, **options: Any) -> tuple[BYOL, list[Step], OnCpu | None]:
    """(the model after an epoch of eight batches, all steps, what stood in for a graph on a CPU).

    then_evaluated: after each step, on images of another shape.
    """
    model = new_model(device)
    runtime = Runtime(device, amp, channels_last=channels_last, cuda_graph=graph)
    runtime.place_model(model)
    stand_in = None
    if graph and device.type == "cpu":
        runtime.cuda_graph, runtime.recorder = True, (stand_in := OnCpu(model))
    if graph:
        assert runtime.cuda_graph
    makers = {"sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
              "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
              "lars": lambda parameters: LARS(parameters, lr=0.1)}
    chosen = makers[optimizer](model.online.parameters())
    steps: list[Step] = []

    def after_step(progress: Progress, step: Step) -> None:
        steps.append(step)
        if then_evaluated:
            evaluate(model, device)

    train(model, batches or batches_of(8, device), 1, optimizer=chosen, runtime=runtime, accum_steps=accum_steps, tau_base=0.9,
          lr_scheduler=torch.optim.lr_scheduler.LinearLR(chosen, 1.0, 0.1, 8), lr_scheduler_interval="step",
          after_step=after_step, **options)
    return model, steps, stand_in


def evaluate(model: BYOL, device: torch.device) -> None:
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model.online.backbone(torch.ones(2, 3, 12, 12, device=device))).all()
    model.train()


def differ(one: BYOL, other: BYOL) -> list[str]:
    theirs = other.state_dict()
    return [name for name, tensor in one.state_dict().items() if not torch.equal(tensor, theirs[name])]


@pytest.mark.parametrize("options", [
    {}, {"optimizer": "adamw"}, {"optimizer": "lars", "channels_last": True}, {"then_evaluated": True},
    {"accum_steps": 2}, {"amp": torch.bfloat16}, {"amp": torch.bfloat16, "accum_steps": 2}], ids=str)
def test_training_is_the_same_with_a_graph_and_without(options: dict[str, Any]) -> None:
    plain, steps, _ = trained(False, **options)
    model, with_graph, stand_in = trained(True, **options)
    assert stand_in and stand_in.recordings == 1 and stand_in.replays == 8 - WARM_UP
    assert differ(plain, model) == []
    for one, other in zip(steps, with_graph, strict=True):  # also those of steps long ago
        for name in ("loss", "projection1", "projection2"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_gradients_set_to_none_are_put_back_where_the_graph_adds_to_them() -> None:
    weight = nn.Parameter(torch.ones(3))
    seen: list[Tensor] = []

    def compute(view1: Tensor, view2: Tensor) -> tuple[Tensor, ...]:
        (weight * view1 * view2).sum().backward()
        return (view1.sum(),)

    def record(work: Callable[[], None], device: torch.device) -> Callable[[], object]:
        work()
        static = weight.grad
        assert static is not None
        static.zero_()
        return lambda: (static.add_(1.0), seen.append(static))

    recorded = Recorded(compute, [weight], CPU, record)
    view = torch.ones(3)
    for _ in range(WARM_UP + 1):
        recorded(view, view)
        assert weight.grad is not None
        weight.grad.zero_()
    for left_there, expected in ((None, 1.0), (torch.full((3,), 5.0), 6.0)):
        weight.grad = left_there
        recorded(view, view)
        assert weight.grad is seen[0] and torch.equal(weight.grad, torch.full((3,), expected))
    assert recorded(view.double(), view.double())[0].dtype == torch.float64  # the graph has views of another type


# Before it is decided which views the graph is for, when it is, when they are recorded, later, and often.
@pytest.mark.parametrize("places", [[1], [2], [3], [5], [4, 5, 6]])
def test_a_batch_that_is_smaller_is_trained_on_and_the_graph_is_that_of_the_others(places: list[int]) -> None:
    batches = batches_of(8)
    for place in places:
        batches[place] = batches[place][0][:3], batches[place][1][:3]
    plain, steps, _ = trained(False, batches=batches)
    model, with_graph, stand_in = trained(True, batches=batches)
    assert stand_in and stand_in.recordings == 1 and stand_in.replays == 8 - len(places) - WARM_UP
    assert differ(plain, model) == [] and with_graph[places[0]].projection1.shape == (3, 6)
    assert all(torch.equal(one.loss, other.loss) for one, other in zip(steps, with_graph, strict=True))


def test_parameters_that_were_given_one_gradient_get_one_each() -> None:
    weights = [nn.Parameter(torch.full((3,), float(value))) for value in (1, 2)]

    def both_in_one(view1: Tensor, view2: Tensor) -> tuple[Tensor, ...]:
        (weights[0].view(3) + weights[1].view(3)).backward(5 * view1)
        return (view1 + view2,)

    for recorded in False, True:
        compute = Recorded(both_in_one, weights, CPU, lambda work, device: work) if recorded else both_in_one
        for _ in range(WARM_UP + 2):
            for weight in weights:
                weight.grad = None
            compute(torch.ones(3), torch.ones(3))
            if not recorded:
                assert weights[0].grad is not None and weights[1].grad is not None
                assert weights[0].grad.data_ptr() == weights[1].grad.data_ptr()
            for weight in weights:
                assert weight.grad is not None and torch.equal(weight.grad, torch.full((3,), 5.0))


def test_a_criterion_with_weights_of_its_own_is_trained_too() -> None:
    kept = []
    for graph in False, True:
        model, scale = new_model(), nn.Parameter(torch.ones(6))
        runtime = Runtime()
        if graph:
            runtime.cuda_graph, runtime.recorder = True, OnCpu(nn.ModuleList([model, nn.ParameterList([scale])]))
        optimizer = torch.optim.SGD([*model.online.parameters(), scale], lr=0.1)
        train(model, batches_of(8), 1, optimizer=optimizer, runtime=runtime,
              criterion=lambda prediction, projection: (scale * prediction - projection.detach()).square().mean())
        kept.append(scale.detach().clone())
    assert torch.equal(*kept) and not torch.equal(kept[0], torch.ones(6))


def test_what_makes_the_host_wait_is_computed_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "watched", lambda call, device: (call(), True))
    with pytest.warns(UserWarning, match="no CUDA graph is made, as the network or the loss makes the host wait"):
        model, _, stand_in = trained(True)
    assert stand_in and stand_in.recordings == 0 and differ(model, trained(False)[0]) == []


NOT_RECORDED = "cannot be recorded as a CUDA graph - leave --cuda-graph out, or cuda_graph=False; torch says: "


@pytest.mark.parametrize("raised, kind, said", [
    (None, RuntimeError, f"{NOT_RECORDED}operation failed"),
    (RuntimeError("cannot look at a number"), RuntimeError, f"{NOT_RECORDED}cannot look at a number"),
    (torch.OutOfMemoryError("2 GiB"), torch.OutOfMemoryError, "2 GiB")])
def test_what_cannot_be_recorded_is_refused_with_the_cause_and_the_way_out(
        raised: Exception | None, kind: type[Exception], said: str) -> None:
    """torch raises where the computation is at fault, and again when the recording ends; of memory, what it has for it."""
    recording = False

    def compute(view1: Tensor, view2: Tensor) -> tuple[Tensor, ...]:
        if recording and raised:
            raise raised
        return (view1,)

    def record(work: Callable[[], None], device: torch.device) -> Callable[[], object]:
        nonlocal recording
        recording = True
        try:
            work()
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    recorded = Recorded(compute, [], CPU, record)
    for _ in range(WARM_UP):
        recorded(torch.ones(1), torch.ones(1))
    with pytest.raises(kind, match=said):
        recorded(torch.ones(1), torch.ones(1))


def test_a_graph_is_for_one_gpu_alone() -> None:
    compute = new_model().forward
    assert not Runtime("cpu", cuda_graph=True).cuda_graph
    assert Runtime("cpu", cuda_graph=True).recorded(compute, []) is compute


# On a GPU


@pytest.fixture
def exact() -> Iterator[None]:
    """cuDNN's algorithms that repeat their results, so that two trainings can be compared."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"accum_steps": 2}, {"amp": torch.bfloat16}, {"amp": torch.float16},
                                     {"amp": torch.bfloat16, "accum_steps": 2, "optimizer": "adamw"},
                                     {"channels_last": True, "optimizer": "lars"}, {"then_evaluated": True}], ids=str)
def test_a_gpu_trains_the_same_with_a_graph_and_without(options: dict[str, Any], exact: None) -> None:
    gpu = torch.device("cuda")
    plain, steps, _ = trained(False, device=gpu, **options)
    model, with_graph, _ = trained(True, device=gpu, **options)
    assert differ(plain, model) == []  # dropout included
    for one, other in zip(steps, with_graph, strict=True):
        assert torch.equal(one.loss, other.loss) and torch.equal(one.projection2, other.projection2)
    assert len({float(step.loss) for step in with_graph}) > 4  # each replay computes anew


@pytest.mark.gpu
def test_a_network_that_looks_at_a_number_is_trained_without_a_graph() -> None:
    gpu = torch.device("cuda")

    def criterion(prediction: Tensor, projection: Tensor) -> Tensor:
        loss = (prediction - projection.detach()).square().mean()
        return loss / max(1.0, loss.item())

    with pytest.warns(UserWarning, match="no CUDA graph is made"):
        model, _, _ = trained(True, device=gpu, criterion=criterion)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.gpu
def test_what_cannot_be_recorded_says_so_on_a_gpu() -> None:
    """In a process of its own, as a recording that failed leaves torch unfit for further work."""
    code = "from tests.test_cuda_graph import look_at_a_number_late; look_at_a_number_late()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def look_at_a_number_late() -> None:
    """From the fourth call on, which was not seen before."""
    calls = [0]

    def criterion(prediction: Tensor, projection: Tensor) -> Tensor:
        calls[0] += 1
        loss = (prediction - projection.detach()).square().mean()
        return loss / (loss.item() if calls[0] > 2 * WARM_UP else 1.0)

    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph"):
        warnings.simplefilter("ignore")
        trained(True, device=torch.device("cuda"), criterion=criterion)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
