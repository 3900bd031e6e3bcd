"""Exponential moving average of one network's tensors into another's; imports torch alone and may be copied alone."""

import math
import sys
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Wrappers insert one segment into names. They are known by type, as (module of the class, class, segment); a class
# whose module was never imported has no instances, so nothing needs to be imported here.
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
)
_AVERAGED = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})
_PLAIN = frozenset({Tensor, nn.Parameter})
_NO_MODULE = nn.Module()
_ONLINE = -1

_Lists = tuple[list[Tensor], list[Tensor]]  # target's and online's, as a fused operation takes them
_Pairs = tuple[list[str], list[Tensor], list[Tensor]]  # labels such as "parameter 'conv1.weight'", target's, online's
_Groups = dict[tuple[object, ...], _Pairs]  # by what a fused operation wants alike; first, whether it averages


@torch.inference_mode()  # more than no_grad: a target made under inference_mode may be written, too
def ema_update(target: nn.Module, online: nn.Module, tau: float, *,
               buffers: Literal["keep", "copy", "average"] = "keep") -> None:
    """target <- tau * target + (1 - tau) * online, in place, tensors paired by name.

    online may hold more than target (the predictor), target may not. Wrappers (DistributedDataParallel, DataParallel,
    torch.compile, activation checkpointing) are looked through at any depth. Tied tensors are updated once. A float32
    target may follow a bfloat16 or float16 online network. No graph is kept; requires_grad plays no part.
    target, online: networks of equal shapes on equal devices; DTensors (FSDP2) must be sharded alike.
    tau: in [0, 1]; 0 copies online exactly, 1 leaves target as it is.
    buffers: "keep" never looks at buffers; "copy" copies online's; "average" averages floating ones and copies the
    others, such as batch normalisation's counter.
    Raises: ValueError naming the first argument or tensor that does not fit, with target untouched.
    Source: Grill et al. 2020 (arXiv 2006.07733), equation 1.

    >>> online, target = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> online.weight.data.fill_(1.0), target.weight.data.fill_(0.0)
    (tensor([[1., 1.]]), tensor([[0., 0.]]))
    >>> ema_update(target, online, tau=0.75)
    >>> target.weight.data
    tensor([[0.2500, 0.2500]])
    """
    try:
        weight = math.nan if isinstance(tau, str) else float(tau)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"ema_update: tau must be in [0, 1], got {tau!r}")
    tau = weight
    if buffers not in ("keep", "copy", "average"):
        raise ValueError(f"ema_update: buffers must be 'keep', 'copy' or 'average', got {buffers!r}")
    lerps, copies = _plan(target, online, tau, buffers)
    for targets, onlines in lerps:
        torch._foreach_lerp_(targets, onlines, 1.0 - tau)
    for targets, onlines in copies:
        torch._foreach_copy_(targets, onlines)


def _plan(target: nn.Module, online: nn.Module, tau: float, buffers: str) -> tuple[list[_Lists], list[_Lists]]:
    """Targets and onlines to lerp, and those to copy, once everything is checked and cast."""
    lerps: list[_Lists] = []
    copies: list[_Lists] = []
    for (average, *_), (_, targets, onlines) in _distinct(*_pairs(target, online, buffers)).items():
        if not average or tau == 0.0:  # a lerp of weight 1 would keep target's nan and inf
            copies.append((targets, onlines))
        elif tau < 1.0:
            if onlines[0].dtype != targets[0].dtype:
                onlines = [tensor.to(targets[0].dtype) for tensor in onlines]
            lerps.append((targets, onlines))
    return lerps, copies


def _pairs(target: nn.Module, online: nn.Module, buffers: str) -> tuple[_Groups, list[Tensor]]:
    """Checked pairs in groups that one fused operation can serve, and the tensors in memory that only online holds."""
    for role, module in (("target", target), ("online", online)):
        if not isinstance(module, nn.Module):
            raise ValueError(f"ema_update: {role} must be a torch.nn.Module, got {type(module).__name__}")
    dtensor = _loaded("torch.distributed.tensor", "DTensor")
    groups: _Groups = {}
    unpaired: list[Tensor] = []
    for kind in ("parameter",) if buffers == "keep" else ("parameter", "buffer"):
        found, rest = _walk(target, online, kind)
        alike: tuple[object, ...] = ()
        for label, mine, theirs in found:
            if theirs is None:
                raise ValueError(f"ema_update: target {label} has no partner in online{_hint(label, kind, online)}")
            if type(mine) not in _PLAIN or type(theirs) not in _PLAIN:
                if isinstance(mine, dtensor) or isinstance(theirs, dtensor):
                    mine, theirs = _shards(label, mine, theirs, dtensor)
                alike = ()  # lazy ones among them have no shape to compare
            properties = mine.dtype, theirs.dtype, mine.device, theirs.device, mine.layout, theirs.layout
            # Most often a pair is like the one before it, which was checked; then little can be wrong with it.
            if properties != alike or mine.shape != theirs.shape or not mine.is_contiguous() or mine.is_neg():
                average = kind == "parameter" or buffers == "average" and _is_inexact(mine)
                refusal = _refusal(mine, theirs, average)
                if refusal:
                    raise ValueError(f"ema_update: target {label} {refusal}")
                labels, targets, onlines = groups.setdefault((average, *properties), ([], [], []))
                alike = () if mine.is_complex() else properties  # a complex tensor may be conjugate: check each
            labels.append(label)
            targets.append(mine)
            onlines.append(theirs)
        unpaired += [tensor.to_local() if isinstance(tensor, dtensor) else tensor for tensor in rest
                     if not is_lazy(tensor) and tensor.layout is torch.strided]
    if not groups:
        raise ValueError("ema_update: target holds no tensors to update")
    return groups, unpaired


def _loaded(path: str, name: str) -> tuple[type[Any], ...]:
    """The class of that name, or nothing when its module was never imported."""
    kind = getattr(sys.modules.get(path), name, None)
    return () if kind is None else (kind,)


def _walk(target: nn.Module, online: nn.Module,
          kind: str) -> tuple[list[tuple[str, Tensor, Tensor | None]], list[Tensor]]:
    """(label, target's tensor, online's or None) down both module trees at once, and online's tensors left over."""
    wrappers = {wrapper: segment for path, name, segment in _WRAPPERS for wrapper in _loaded(path, name)}
    fsdp = _loaded("torch.distributed.fsdp", "FSDPModule")
    plain: set[type] = set()  # the types met that are none of these, as asking every module is slow
    attribute = f"_{kind}s"
    found: list[tuple[str, Tensor, Tensor | None]] = []
    left_over: list[Tensor] = []

    def unwrap(module: nn.Module) -> nn.Module:
        for base in type(module).__mro__:
            if base in wrappers:
                return unwrap(getattr(module, wrappers[base]))
        if isinstance(module, fsdp):
            module.reshard()  # gathered parameters are copies: writing to them has no effect
        else:
            plain.add(type(module))
        return module

    def descend(target: nn.Module, online: nn.Module, prefix: str) -> None:
        if type(target) not in plain:
            target = unwrap(target)
        if type(online) not in plain:
            online = unwrap(online)
        own, others = getattr(target, attribute), getattr(online, attribute)
        if own or others:
            for name, tensor in own.items():
                partner = others[name] if name in others else None
                if tensor is not None:
                    found.append((f"{prefix}{name}'", tensor, partner))
                elif partner is not None:
                    left_over.append(partner)
            if others.keys() != own.keys():
                left_over.extend(tensor for name, tensor in others.items() if name not in own and tensor is not None)

        own, others = target._modules, online._modules
        if own or others:
            for name, child in own.items():
                if child is not None:
                    partner = others[name] if name in others else None
                    descend(child, _NO_MODULE if partner is None else partner, f"{prefix}{name}.")
            if others.keys() != own.keys():
                for name, child in others.items():
                    if child is not None and name not in own:
                        left_over.extend(child.parameters() if kind == "parameter" else child.buffers())

    target, online = unwrap(target), unwrap(online)
    if target is online:
        raise ValueError("ema_update: target and online are the same module; make target with copy.deepcopy(online)")
    try:
        descend(target, online, f"{kind} '")
    except RecursionError:
        raise ValueError("ema_update: target contains itself, or its modules are nested too deeply") from None
    return found, left_over


def _hint(label: str, kind: str, online: nn.Module) -> str:
    """What online holds instead; the usual cause is a wrapper of unknown type around one of the two."""
    name = label.removeprefix(f"{kind} ").strip("'")
    names = [other for other, _ in (online.named_parameters() if kind == "parameter" else online.named_buffers())]
    if not names:
        return f", which has no {kind}s"
    wrapper = names[0].partition(".")[0]
    if f"{wrapper}.{name}" in names and all(other.startswith(f"{wrapper}.") for other in names):
        return f", whose names all start with '{wrapper}.'; pass online.{wrapper}"
    wrapper, _, rest = name.partition(".")
    if rest in names:
        return f", which calls it '{rest}'; pass target.{wrapper}"
    return f", whose first {kind} is '{names[0]}'"


def _shards(label: str, target: Tensor, online: Tensor, dtensor: tuple[type[Any], ...]) -> tuple[Tensor, Tensor]:
    """This process's shards of two DTensors, which must be laid out alike: then the update needs no communication."""
    layouts = [(tensor.device_mesh, tensor.placements) if isinstance(tensor, dtensor) else "a plain tensor"
               for tensor in (target, online)]
    if layouts[0] != layouts[1] or target.shape != online.shape:
        raise ValueError(f"ema_update: target {label} is {layouts[0]} of shape {tuple(target.shape)}, online's is "
                         f"{layouts[1]} of shape {tuple(online.shape)}; shard both networks alike")
    return target.to_local(), online.to_local()  # type: ignore[attr-defined]


def _refusal(target: Tensor, online: Tensor, average: bool) -> str:
    """Why this pair cannot be averaged or copied, '' if it can; follows the label of target's tensor."""
    if (type(target) is not nn.Parameter or type(online) is not nn.Parameter) and (is_lazy(target) or is_lazy(online)):
        return "is not initialized, or online's is not; run one batch through both networks first"
    if target.shape != online.shape:
        return f"has shape {tuple(target.shape)}, online's {tuple(online.shape)}"
    if target.device != online.device:
        return f"is on {target.device}, online's on {online.device}; move one of the networks"
    if target.is_meta:
        return "is on the meta device and holds no values; load both networks first"
    if target.layout is not torch.strided or online.layout is not torch.strided:
        return f"has layout {target.layout}, online's {online.layout}; only dense tensors can be averaged"
    dtype = target.dtype
    if average and dtype not in _AVERAGED:
        if not _is_inexact(target):
            return f"is {dtype}, and integers cannot be averaged"
        return (f"is {dtype}, in which small steps round away (a bfloat16 target at tau 0.999 never moves); "
                "keep target in float32: target.float()")
    if dtype != online.dtype and not (
            _is_inexact(target) and dtype.is_complex == online.is_complex() and _is_inexact(online)
            and _holds(dtype, online.dtype)):
        return f"is {dtype}, which does not hold online's {online.dtype}"
    if not target.is_contiguous() and _overlaps_itself(target):
        return "is expanded: several of its elements share memory; clone it"
    if dtype.is_complex and target.is_conj() or target.is_neg():
        return "is a lazy conjugate or negative, which cannot be written to; call resolve_conj() or resolve_neg()"
    return ""


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every value of `other` is one of `dtype`, as far as torch promotes types; 8-bit floats fit everywhere."""
    if other.itemsize == 1:
        return dtype.itemsize > 1
    return torch.promote_types(dtype, other) == dtype


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory: some stride does not step over all that the smaller ones reach."""
    reached = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1):
        if stride <= reached:
            return True
        reached += (size - 1) * stride
    return False


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _distinct(groups: _Groups, unpaired: list[Tensor]) -> _Groups:
    """The pairs with tied tensors once; every byte of target is written once, and none of them belongs to online."""
    everything = list(unpaired)
    for _, targets, onlines in groups.values():
        everything += targets
        everything += onlines
    pointers = {tensor.untyped_storage().data_ptr() for tensor in everything}
    if 0 in pointers:
        for labels, targets, onlines in groups.values():
            for label, mine, theirs in zip(labels, targets, onlines):
                if mine.numel() and 0 in (mine.untyped_storage().data_ptr(), theirs.untyped_storage().data_ptr()):
                    raise ValueError(f"ema_update: target {label} or online's holds no memory, as after a sharding "
                                     "wrapper freed it; gather it first")
    if len(pointers) == len(everything):
        return groups

    kept: _Groups = {}
    pairs: list[tuple[str, Tensor, Tensor]] = []
    for key, (labels, targets, onlines) in groups.items():
        first: dict[object, tuple[str, Tensor, Tensor]] = {}
        for label, mine, theirs in zip(labels, targets, onlines):
            if mine.numel():
                known = first.setdefault(_place(mine), (label, mine, theirs))
                if _place(known[2]) != _place(theirs):
                    raise ValueError(f"ema_update: target ties {known[0]} and {label}, online does not; "
                                     "tie them in both, or in neither")
        if first:
            pairs += first.values()
            kept[key] = ([label for label, _, _ in first.values()], [mine for _, mine, _ in first.values()],
                         [theirs for _, _, theirs in first.values()])
    spans = [(*_span(mine), number) for number, (_, mine, _) in enumerate(pairs)]
    spans += [(*_span(tensor), _ONLINE) for tensor in unpaired + [theirs for *_, theirs in pairs] if tensor.numel()]

    shared: set[int] = set()
    storage = online_end = target_end = target = 0
    for current, start, end, number in sorted(spans):
        if current != storage:
            storage, online_end, target_end = current, 0, 0
        if number == _ONLINE:
            shared |= {target} if start < target_end else set()
            online_end = max(online_end, end)
        else:
            shared |= {number} if start < online_end else set()
            if start < target_end:
                raise ValueError(f"ema_update: target's {pairs[target][0]} and {pairs[number][0]} overlap in memory; "
                                 "clone one of them")
            target_end, target = end, number
    if shared:
        raise ValueError(f"ema_update: target and online share {pairs[min(shared)][0]}; give target its own memory, as "
                         "with copy.deepcopy(online)")
    return kept


def _place(tensor: Tensor) -> tuple[object, ...]:
    return *_span(tensor), tensor.shape, tensor.stride()


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """Storage, first byte and end of a tensor's memory."""
    start = int(tensor.storage_offset()) * tensor.itemsize
    return tensor.untyped_storage().data_ptr(), start, start + _extent(tensor) * tensor.itemsize


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last in memory, of a tensor that is not empty."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
