"""LARS as in BYOL's published code: layer-wise adaptive rate scaling with heavy-ball momentum."""

import math
from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@torch.no_grad()
def lars_update(params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor], *,
                lr: float, momentum: float, weight_decay: float, trust: float, adapt: bool,
                found_inf: Tensor | None = None) -> None:
    """g' = g + wd p; r = trust |p| / |g'|; m <- momentum m + r g'; p <- p - lr m, in place for every tensor.

    r is 1 where |p| or |g'| is 0, and everywhere when adapt is False, which is plain heavy-ball SGD.
    params, grads, momentum_buffers: equally long, tensor by tensor of one shape, all of one dtype and device; grads
    are only read. Nothing is read back to the host. found_inf: () on the device; where it is not 0, nothing changes.
    Source: DeepMind's byol/utils/optimizers.py. The method is You et al.'s (2017, arXiv 1708.03888), whose algorithm 1
    divides by |g| + wd |p| instead, and has lr in the momentum: m <- momentum m + lr r g'; p <- p - m.
    """
    # A GPU wants all tensors in one launch, a CPU one tensor after the other, so that each stays in its cache.
    size = len(params) if params and params[0].device.type != "cpu" else 1
    for start in range(0, len(params), size):
        part = slice(start, start + size)
        _update(params[part], grads[part], momentum_buffers[part], lr, momentum, weight_decay, trust, adapt, found_inf)


def _update(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], lr: float, momentum: float,
            weight_decay: float, trust: float, adapt: bool, found_inf: Tensor | None) -> None:
    values = params
    if adapt and params[0].dtype.itemsize < 4:  # a norm soon leaves float16's range, or the ratio does
        values, grads = ([tensor.float() for tensor in tensors] for tensors in (params, grads))
    updates = torch._foreach_add(grads, values, alpha=weight_decay) if weight_decay else grads
    if found_inf is not None:  # a skipped step: nothing is added to the momentum, nothing taken off it or the parameters
        skip = found_inf.reshape(()) != 0
        updates = [torch.where(skip, 0.0, update) for update in updates]
        torch._foreach_mul_(buffers, torch.where(skip, 1.0, momentum).to(buffers[0].dtype))
    else:
        torch._foreach_mul_(buffers, momentum)
    if adapt:
        param_norms = torch.stack(torch._foreach_norm(values))
        update_norms = torch.stack(torch._foreach_norm(updates))
        ratios = torch.where((param_norms > 0) & (update_norms > 0), trust * param_norms / update_norms, 1.0)
        torch._foreach_addcmul_(buffers, updates, ratios.unbind())
    else:
        torch._foreach_add_(buffers, updates)
    if found_inf is not None:
        torch._foreach_addcmul_(params, buffers, [torch.where(skip, 0.0, -lr).to(params[0].dtype)] * len(params))
    else:
        torch._foreach_add_(params, buffers, alpha=-lr)


class LARS(Optimizer):
    """g' = g + wd p; r = trust |p| / |g'|; m <- momentum m + r g'; p <- p - lr m.

    Each parameter group may set its own lr, momentum, weight_decay, trust and adapt (default True). adapt and
    weight_decay are independent: see `parameter_groups`. Momentum is heavy-ball: no dampening, no Nesterov. Gradients
    are not modified, and a step never waits for the device. As with torch's fused optimizers, an attribute found_inf that
    is not 0 makes a step change nothing.
    Raises: ValueError for a value that is negative or not finite, naming it.
    params: in float32 or float64; in 16 bits a step is often smaller than half of their spacing and rounds away.
    Source: DeepMind's byol/utils/optimizers.py; see `lars_update` for what differs from You et al. 2017.

    >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> optimizer = LARS([weight], lr=0.5, trust=0.1)
    >>> weight.grad = torch.tensor([[0.0, 2.0]])
    >>> optimizer.step()  # |p| = 5, |g| = 2: the step is 0.5 * 0.1 * 5 / 2 * g
    >>> weight.data
    tensor([[3.0000, 3.7500]])
    """

    skips_on_device = True  # where found_inf is not 0

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, object]], lr: float, momentum: float = 0.9,
                 weight_decay: float = 0.0, trust: float = 1e-3) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust, adapt=True))

    def add_param_group(self, param_group: dict[str, object]) -> None:
        for key in ("lr", "momentum", "weight_decay", "trust"):
            value = param_group.get(key, self.defaults[key])
            if not (isinstance(value, (int, float)) and 0.0 <= value < math.inf):
                raise ValueError(f"LARS: {key} must be a finite Python number, not negative, got {value!r}")
        if not isinstance(param_group.get("adapt", True), bool):
            raise ValueError(f"LARS: adapt must be True or False, got {param_group['adapt']!r}")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns what closure, run first with gradients, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.layout is not torch.strided:
                    raise ValueError(f"LARS: gradients must be dense, got one of layout {param.grad.layout} - "
                                     "make the embedding with sparse=False")
        for group in self.param_groups:
            alike: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                params, grads, buffers = alike.setdefault((param.dtype, param.device), ([], [], []))
                params.append(param)
                grads.append(param.grad)
                buffers.append(state["momentum_buffer"])
            for params, grads, buffers in alike.values():
                lars_update(params, grads, buffers, lr=group["lr"], momentum=group["momentum"],
                            weight_decay=group["weight_decay"], trust=group["trust"], adapt=group["adapt"],
                            found_inf=getattr(self, "found_inf", None))
        return loss


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups for LARS: weights, decayed and adapted; biases and 1-D tensors, neither.

    Frozen parameters are left out, tied ones listed once. Either group may be empty. Also fits torch's optimizers,
    which carry the key adapt along unused.
    Source: Grill et al. 2020, section 3.3: biases and batch-normalisation parameters are excluded from both.

    >>> [len(group["params"]) for group in parameter_groups(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), 1e-6)]
    [1, 3]
    """
    weights: list[Tensor] = []
    others: list[Tensor] = []
    for name, param in module.named_parameters():
        if param.requires_grad:
            (others if param.ndim < 2 or name.endswith("bias") else weights).append(param)
    return [{"params": weights, "weight_decay": weight_decay, "adapt": True},
            {"params": others, "weight_decay": 0.0, "adapt": False}]
