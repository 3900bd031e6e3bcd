"""Time ema_update beside other implementations, on a ResNet-50 with a BYOL projector: python -m tests.bench.ema"""

import argparse
import copy
import importlib
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from byol_core.ema import ema_update
from tests.bench import rivals
from tests.bench.table import environment, markdown, milliseconds_on_gpu, parse, show, side_by_side

TAU = 0.996
OURS, COPY = "**ema_update**", "flat copy (limit)"


def network() -> nn.Module:
    """Backbone and projector: what both the online and the target network of BYOL have."""
    backbone = torchvision.models.resnet50()
    backbone.fc = nn.Identity()
    projector = nn.Sequential(nn.Linear(2048, 4096), nn.BatchNorm1d(4096), nn.ReLU(), nn.Linear(4096, 256))
    return nn.ModuleDict({"backbone": backbone, "projector": projector}).requires_grad_(False)


def ours_and_limits(target: nn.Module, online: nn.Module) -> dict[str, Callable[[], object]]:
    targets: list[Tensor] = list(target.parameters())
    onlines: list[Tensor] = list(online.parameters())
    flat_target, flat_online = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (targets, onlines))

    def rebind() -> None:
        for mine, theirs in zip(targets, onlines):
            mine.data = mine.data * TAU + theirs.data * (1 - TAU)

    return {
        COPY: lambda: flat_target.copy_(flat_online),
        "flat lerp (limit)": lambda: flat_target.lerp_(flat_online, 1 - TAU),
        "bare fused lerp": lambda: torch._foreach_lerp_(targets, onlines, 1 - TAU),
        OURS: lambda: ema_update(target, online, TAU),
        "**ema_update**, buffers averaged": lambda: ema_update(target, online, TAU, buffers="average"),
        "rebinding loop (the source system)": rebind,
    }


def torch_averaged_model(target: nn.Module, online: nn.Module) -> Callable[[], object]:
    averaged = AveragedModel(target, multi_avg_fn=get_ema_multi_avg_fn(TAU))
    averaged.n_averaged.fill_(1)  # the first call only copies
    return lambda: averaged.update_parameters(online)


def timm(target: nn.Module, online: nn.Module) -> Callable[[], object]:
    averaged = importlib.import_module("timm.utils").ModelEmaV3(target, decay=TAU)
    return lambda: averaged.update(online)


def ema_pytorch(target: nn.Module, online: nn.Module) -> Callable[[], object]:
    averaged = importlib.import_module("ema_pytorch").EMA(online, ema_model=copy.deepcopy(target), beta=TAU,
                                                          use_foreach=True)
    return lambda: averaged.update_moving_average(averaged.ema_model, online, TAU)  # without its every-tenth-step rule


def lightly(target: nn.Module, online: nn.Module) -> Callable[[], object]:
    update_momentum = importlib.import_module("lightly.models.utils").update_momentum
    return lambda: update_momentum(online, target, m=TAU)


def byol_pytorch(target: nn.Module, online: nn.Module) -> Callable[[], object]:
    module, averaged = importlib.import_module("byol_pytorch.byol_pytorch"), copy.deepcopy(target)
    return lambda: module.update_moving_average(module.EMA(TAU), averaged, online)


PEERS = {"timm ModelEmaV3": ("timm", timm), "ema-pytorch, foreach": ("ema-pytorch", ema_pytorch),
         "lightly update_momentum": ("lightly", lightly), "byol-pytorch": ("byol-pytorch", byol_pytorch)}


def main() -> None:
    options = parse(argparse.ArgumentParser(description=__doc__))
    target, online = network().to(options.device), network().to(options.device)
    count = sum(param.numel() for param in target.parameters())
    on_gpu = options.device.startswith("cuda")
    functions = ours_and_limits(target, online)
    functions["torch AveragedModel, EMA helper"] = torch_averaged_model(target, online)
    peers = dict(rivals.present({name: partial(make, target, online) for name, (_, make) in PEERS.items()}))
    functions |= peers
    with torch.no_grad():
        times = side_by_side(functions, options.device, options.rounds, seconds=options.seconds)
        alone = {name: milliseconds_on_gpu(functions[name], options.device) for name in times} if on_gpu else times
    rates = {name: 4 * count * (2 if name == COPY else 3) / value / 1e6  # bytes: read and written, and read twice and written
             for name, value in alone.items()}
    rows = [(name, f"{value:.2f}", *([f"{alone[name]:.3f}"] if on_gpu else []), f"{value / times['bare fused lerp']:.2f}",
             f"{rates[name]:.1f}") for name, value in sorted(times.items(), key=lambda item: item[1])]
    columns = ("implementation", "median ms", *(["ms of the GPU alone"] if on_gpu else []), "times the bare lerp",
               "GB/s of 12 (copy: 8) bytes")
    packages = (PEERS[name][0] for name in peers)
    text = f"{environment(options.device, *packages)}\n\n{markdown(columns, rows)}"
    show(f"EMA, {count / 1e6:.1f} M parameters", text, options, milliseconds=times, milliseconds_of_the_device=alone,
         share_of_copy_bandwidth=rates[OURS] / rates[COPY])


if __name__ == "__main__":
    main()
