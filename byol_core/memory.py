"""Less memory for large networks: activations that are computed again instead of kept; and how much was used."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
NORMS = (nn.modules.batchnorm._BatchNorm,)


def recompute_blocks(network: nn.Module) -> int:
    """Let the network's repeated blocks keep only their input and compute the rest again in the backward pass.

    A block is a member of an nn.Sequential with at least two convolutions or linear layers, such as those of torchvision's
    ResNets, ConvNeXts and vision transformers. Gradients, running statistics and names stay as they are; a training step
    takes about a third longer. Do not copy the network afterwards.
    Returns: how many blocks there are; with 0 nothing has changed.
    Source: Chen et al. 2016 (arXiv 1604.06174), by torch.utils.checkpoint.
    """
    blocks = list(_blocks(network))
    for block in blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, context_fn=functools.partial(_contexts, block))
    return len(blocks)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    for child in network.children():
        weighted = sum(isinstance(module, WEIGHTED) for module in child.modules())
        if isinstance(network, nn.Sequential) and not isinstance(child, nn.Sequential) and weighted >= 2:
            yield child
        else:
            yield from _blocks(child)


def _contexts(block: nn.Module) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Around the first pass through a block, and around the second."""
    return contextlib.nullcontext(), _without_statistics(block)


@contextlib.contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norm has counted this batch already, and must not do so again."""
    norms = [module for module in block.modules() if isinstance(module, NORMS) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked -= 1


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has used so far: of the GPU where it computes on one, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux: getrusage there also counts what the process that started this one held at that moment
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
