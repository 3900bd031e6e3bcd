"""What the speed benchmarks share: training steps of other packages on our networks' shapes, bare steps, machine limits."""

import contextlib
import copy
import importlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.benchmark import Timer
from torch.utils.data import Dataset

from byol_core.backbones import build_backbone
from byol_core.losses import byol_loss
from byol_core.networks import BYOL
from byol_core.runtime import Runtime

HIDDEN, OUT = 1024, 256  # the heads of lightly's CIFAR example
Views = tuple[Tensor, Tensor]


class Photos(Dataset[Any]):
    """Image files, decoded and transformed one by one: what a loader of other packages goes through."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Any]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def lightly_transform(size: int, blur: bool) -> Callable[[Image.Image], Any]:
    """Its BYOL transform; its CIFAR example switches the blur off. Raises: ImportError."""
    module = importlib.import_module("lightly.transforms.byol_transform")
    options = {"input_size": size} if blur else {"input_size": size, "gaussian_blur": 0.0}
    return module.BYOLTransform(module.BYOLView1Transform(**options), module.BYOLView2Transform(**options))


def lightly_loop(arch: str, small_stem: bool, size: int, device: str) -> Callable[[Iterable[Any]], None]:
    """An epoch of the loop that lightly's documentation gives for BYOL: float32, SGD, target first. Raises: ImportError."""
    return lightly_epochs(*build_backbone(arch, small_stem, size), device, partial(torch.optim.SGD, lr=0.06))[0]


def lightly_epochs(backbone: nn.Module, dim: int, device: str, optimizer_of: Callable[[list[nn.Parameter]], Optimizer]
                   ) -> tuple[Callable[[Iterable[Any]], None], Optimizer]:
    """(an epoch of that loop around a backbone with `dim` features, its optimizer). Raises: ImportError."""
    heads = importlib.import_module("lightly.models.modules.heads")
    update_momentum = importlib.import_module("lightly.models.utils").update_momentum
    criterion = importlib.import_module("lightly.loss").NegativeCosineSimilarity()
    online = nn.Sequential(backbone, heads.BYOLProjectionHead(dim, HIDDEN, OUT)).to(device)
    predictor = heads.BYOLPredictionHead(OUT, HIDDEN, OUT).to(device)
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = optimizer_of([*online.parameters(), *predictor.parameters()])

    def epoch(batches: Iterable[Any]) -> None:
        total = torch.zeros((), device=device)
        for view1, view2 in batches:
            update_momentum(online, target, m=0.99)
            view1, view2 = view1.to(device), view2.to(device)
            p1, z1 = predictor(online(view1)), target(view1).detach()
            p2, z2 = predictor(online(view2)), target(view2).detach()
            loss = 0.5 * (criterion(p1, z2) + criterion(p2, z1))
            total += loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch, optimizer


def byol_pytorch_loop(arch: str, small_stem: bool, size: int, device: str) -> Callable[[Iterable[Any]], None]:
    """Steps of byol-pytorch's trainer, its own augmentation left out, so that both views are given. Raises: ImportError."""
    module = importlib.import_module("byol_pytorch")
    backbone, _ = build_backbone(arch, small_stem, size)
    given: list[Tensor] = []
    learner = module.BYOL(backbone.to(device), size, hidden_layer=-1, projection_size=OUT, projection_hidden_size=HIDDEN,
                          use_simplicial_embeddings=False, augment_fn=lambda images: given[0] if given else images,
                          augment_fn2=lambda images: given[1] if given else images)
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-4)

    def epoch(batches: Iterable[Any]) -> None:
        for view1, view2 in batches:
            given[:] = view1.to(device), view2.to(device)
            loss = learner(given[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            learner.update_moving_average()

    return epoch


def bare_loop(model: BYOL, runtime: Runtime) -> Callable[[Iterable[Views]], None]:
    """Nothing but forward and backward, on views that lie ready: the limit of any trainer of these networks."""
    def epoch(batches: Iterable[Views]) -> None:
        for view1, view2 in batches:
            forward_and_backward(model, runtime, view1, view2)
            model.zero_grad(set_to_none=True)

    return epoch


def forward_and_backward(model: BYOL, runtime: Runtime, view1: Tensor, view2: Tensor) -> Tensor:
    """The loss, whose gradients the parameters now have."""
    with runtime.autocast():
        p1, p2, z1, z2 = model(view1, view2)
        loss = byol_loss(p1, z2) + byol_loss(p2, z1)
    loss.backward()
    return loss.detach()


def new_byol(arch: str, small_stem: bool, size: int, runtime: Runtime) -> BYOL:
    torch.manual_seed(0)
    model = BYOL(*build_backbone(arch, small_stem, size), HIDDEN, OUT)
    runtime.place_model(model)
    return model


def random_views(number: int, batch: int, size: int, runtime: Runtime) -> list[Views]:
    """So many batches, of which two lie in memory and take turns."""
    views = [(runtime.place(torch.randn(batch, 3, size, size)), runtime.place(torch.randn(batch, 3, size, size)))
             for _ in range(2)]
    return [views[turn % 2] for turn in range(number)]


def present(makers: Mapping[str, Callable[[], Any]]) -> Iterator[tuple[str, Any]]:
    """What can be made here; what is not installed is named and left out."""
    for name, make in makers.items():
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                made = make()
        except ImportError as error:
            print(f"{name} left out ({error}): pip install 'byol_core[peers]'\n")
        else:
            yield name, made


def machine_limits(device: str) -> str:
    """How fast this machine copies memory and multiplies matrices, in one line."""
    side = 8192 if device.startswith("cuda") else 512
    source = torch.zeros(2**28 if device.startswith("cuda") else 2**25, device=device)
    copied = 2 * source.numel() * source.element_size() / _seconds(source.clone) / 1e9
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(side, side, device=device).to(dtype)
        rates.append(2 * side**3 / _seconds(lambda: matrix @ matrix) / 1e9)
    return (f"Limits of this machine: copies {copied:.3g} GB/s (read and written); multiplies matrices at {rates[0]:.3g} "
            f"GFLOP/s in float32, {rates[1]:.3g} in bfloat16")


def _seconds(work: Callable[[], object]) -> float:
    return Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads()).blocked_autorange().median
