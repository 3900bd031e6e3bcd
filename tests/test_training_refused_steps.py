"""Steps of the loop that are refused or skipped: numbers that are not finite, and what is left as it was."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from byol_core.losses import byol_loss
from byol_core.networks import BYOL
from byol_core.runtime import NonFiniteError, Runtime
from byol_core.training import Progress, Step, train
from tests.helpers.modules import Interrupted, random_views


def test_a_step_that_the_scaler_skips_moves_nothing(small_byol: BYOL) -> None:
    calls = 0

    def overflows_once(prediction: Tensor, projection: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return byol_loss(prediction, projection) * (math.inf if calls == 3 else 1)  # first direction of the second step

    optimizer = torch.optim.SGD(small_byol.online.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    history: list[tuple[bool, float, float, int, list[Tensor]]] = []

    def remember(progress: Progress, step: Step) -> None:
        history.append((step.applied, step.tau, step.lr, progress.updates,
                        [tensor.clone() for tensor in small_byol.state_dict().values()]))  # batch norm's statistics, too

    runtime = Runtime("cpu", torch.float16)
    runtime.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)  # too low to overflow by itself
    progress = train(small_byol, random_views(4), epochs=1, optimizer=optimizer, lr_scheduler=scheduler,
                     lr_scheduler_interval="step", tau_base=0.5, criterion=overflows_once, runtime=runtime,
                     after_step=remember)
    applied, taus, rates, updates, weights = zip(*history)
    assert applied == (True, False, True, True)
    assert updates == (1, 1, 2, 3) and progress.updates == 3
    assert taus[1] == taus[2] and rates[1] == rates[2] == 0.05  # both schedules waited
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1]))
    assert not any(torch.isnan(p).any() for p in small_byol.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(weights[1], weights[2]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(small_byol: BYOL, bad: float) -> None:
    before = [p.detach().clone() for p in small_byol.parameters()]
    with pytest.raises(NonFiniteError, match="not finite"):
        train(small_byol, random_views(1), epochs=1, criterion=lambda p, z: byol_loss(p, z) * bad)
    assert all(torch.equal(a, b) for a, b in zip(before, small_byol.parameters()))


@pytest.mark.parametrize("late", [False, True], ids=["at once", "one step later, as on CUDA"])
@pytest.mark.parametrize("good", [2, 3])
def test_a_refused_step_leaves_the_weights_as_they_were(small_byol: BYOL, late: bool, good: int) -> None:
    views = random_views(4)
    views[good] = views[good][0] * math.nan, views[good][1]
    runtime = Runtime()
    runtime.reads_late = late
    states: list[list[Tensor]] = []

    def weights() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in small_byol.online.parameters()]

    optimizer = torch.optim.SGD(small_byol.online.parameters(), lr=0.1, momentum=0.9, fused=True)
    with pytest.raises(NonFiniteError) as caught:
        train(small_byol, views, 1, optimizer=optimizer, runtime=runtime,
              after_step=lambda progress, step: states.append(weights()))
    assert caught.value.late is late and len(states) == good + late
    assert all(torch.equal(a, b) for a, b in zip(states[good - 1], weights(), strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in small_byol.target.parameters())


def test_a_step_in_doubt_when_after_step_stops_the_loop_is_settled(small_byol: BYOL) -> None:
    """As on CUDA: nothing is known of the last step yet, and the same runtime may train again."""
    runtime, states = Runtime(), []
    runtime.reads_late = True

    def stop_after_three(progress: Progress, step: Step) -> None:
        states.append([parameter.detach().clone() for parameter in small_byol.online.parameters()])
        if progress.updates == 3:
            raise Interrupted

    optimizer = torch.optim.SGD(small_byol.online.parameters(), lr=0.1, momentum=0.9, fused=True)
    views = random_views(3)
    with pytest.raises(Interrupted):
        train(small_byol, [*views[:2], (views[2][0] * math.nan, views[2][1])], 1, optimizer=optimizer, runtime=runtime,
              after_step=stop_after_three)
    assert all(torch.equal(a, b) for a, b in zip(states[1], small_byol.online.parameters(), strict=True))
    assert train(small_byol, views, 1, optimizer=optimizer, runtime=runtime).updates == 3


@pytest.mark.parametrize("kind", ["expanded", "made under inference_mode", "lazy"])
def test_buffers_that_cannot_be_written_keep_no_step_from_being_refused(small_byol: BYOL, kind: str) -> None:
    if kind == "lazy":
        small_byol.online.spare = nn.LazyBatchNorm1d()  # type: ignore[assignment]
    else:
        with torch.inference_mode(kind != "expanded"):
            small_byol.online.register_buffer("ids", torch.arange(3.0)[None].expand(4, 3) if kind == "expanded"
                                              else torch.arange(3.0))
    views = [(view1 * math.nan, view2) for view1, view2 in random_views(25)]
    optimizer = torch.optim.SGD(small_byol.online.backbone.parameters(), lr=0.1)
    with pytest.raises(NonFiniteError, match="20 steps in a row"):
        train(small_byol, views, 1, optimizer=optimizer, runtime=Runtime("cpu", torch.float16))
    assert all(torch.isfinite(buffer).all() for buffer in small_byol.target.buffers())


def test_endless_overflow_in_float16_stops_the_run(small_byol: BYOL) -> None:
    """And leaves everything as it was."""
    before = copy.deepcopy(small_byol.state_dict())
    views = [(view1 * math.inf, view2) for view1, view2 in random_views(25)]
    with pytest.raises(NonFiniteError, match="20 steps in a row"):
        train(small_byol, views, epochs=1, runtime=Runtime("cpu", torch.float16))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), small_byol.state_dict().values(), strict=True))


def test_a_fused_optimizer_whose_first_steps_are_skipped_starts_from_clean_momentum(small_byol: BYOL) -> None:
    calls = 0

    def overflows_first(prediction: Tensor, projection: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return byol_loss(prediction, projection) * (math.inf if calls <= 2 else 1)

    optimizer = torch.optim.SGD(small_byol.online.parameters(), lr=0.1, momentum=0.9, fused=True)
    runtime = Runtime("cpu", torch.float16)
    runtime.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    progress = train(small_byol, random_views(2), epochs=1, optimizer=optimizer, criterion=overflows_first, runtime=runtime)
    assert progress.updates == 1
    for parameter in small_byol.online.parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert float(momentum.abs().max()) < 10 and torch.isfinite(parameter).all()


def test_a_loss_that_is_not_finite_stops_even_where_its_gradient_is(small_byol: BYOL) -> None:
    with pytest.raises(NonFiniteError):
        train(small_byol, random_views(1), 1, criterion=lambda p, z: byol_loss(p, z) + torch.tensor(math.inf))
