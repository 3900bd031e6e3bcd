"""`python -m byol_core.export`: a trained backbone as TorchScript or ONNX, read back and compared before it is kept."""

import importlib
import io
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from byol_core.system.command import Parser, backbone_parser, file_to_write, run_in_two_parts, say

if TYPE_CHECKING:  # torch is loaded when there is something to do: --help need not wait
    from torch import Tensor, nn

    from byol_core.pretrained import Pretrained

NEEDED = {".ts": (), ".onnx": ("onnx", "onnxscript", "onnxruntime")}  # packages, by the ending of the file
TRACED, COMPARED = 2, 5  # images: another number, so that a number of images which was built in would be noticed
TOLERANCE = 1e-3  # of the largest feature; rounding is a thousand times less


@dataclass
class Export:
    """What is to be written, found to be in order."""

    pretrained: "Pretrained"
    out: Path


def build_parser() -> Parser:
    parser = backbone_parser("python -m byol_core.export", "Write a trained backbone as TorchScript or ONNX, for any number "
                             "of images of its size.", with_images=False)
    parser.add_argument("--out", required=True, metavar="FILE", help="where to: a name that ends in .onnx, or in .ts for "
                        "TorchScript")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    return run_in_two_parts(lambda: prepare(options), carry_out, options.debug)


def prepare(options: Namespace) -> Export:
    """Everything that can be wrong is found here, before anything is written."""
    from byol_core.pretrained import load_pretrained

    out = file_to_write("--out", options.out)
    if out.suffix not in NEEDED:
        raise ValueError(f"--out {out}: give a name that ends in .onnx, or in .ts for TorchScript")
    for package in NEEDED[out.suffix]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f"--out {out}: {error} - pip install {' '.join(NEEDED[out.suffix])}") from error
    pretrained = load_pretrained(options.checkpoint, options.network)
    for line in pretrained.notes:
        say(f"warning: {line}")
    return Export(pretrained, out)


def carry_out(export: Export) -> None:
    """Raises: RuntimeError when what is read back gives other features; then nothing is written."""
    import torch

    from byol_core.system.files import atomic_write

    pretrained, out = export.pretrained, export.out
    size = pretrained.recipe.size
    images = torch.randn(COMPARED, 3, size, size, generator=torch.Generator().manual_seed(0))
    convert = _torchscript if out.suffix == ".ts" else _onnx
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls both formats things of the past
        written, read_back = convert(pretrained.backbone, images[:TRACED])
        expected, found = pretrained.backbone(images), read_back(images)
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * largest:  # nor is NaN
        raise RuntimeError(f"read back, features differ by up to {difference:.2g} of {largest:.2g}, so {out} was not written")
    atomic_write(out, lambda file: file.write(written))
    sys.stdout.write(f"{out}: images (n, 3, {size}, {size}) to features (n, {pretrained.feature_dim}); read back, they "
                     f"differ by {difference:.2g} at most, where the largest is {largest:.2g}\n"
                     f"images: RGB in [0, 1], {pretrained.recipe.scale}\n")


def _torchscript(backbone: "nn.Module", images: "Tensor") -> "tuple[bytes, Callable[[Tensor], Tensor]]":
    """(the file, what it gives for images when it is read back)."""
    import torch

    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(backbone, images), file)
    return file.getvalue(), torch.jit.load(io.BytesIO(file.getvalue()))


def _onnx(backbone: "nn.Module", images: "Tensor") -> "tuple[bytes, Callable[[Tensor], Tensor]]":
    """(the file, what it gives for images when it is read back)."""
    import torch

    program = torch.onnx.export(backbone, (images,), input_names=["images"], output_names=["features"], dynamo=True,
                                dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False)
    assert program is not None
    written = program.model_proto.SerializeToString()
    session = importlib.import_module("onnxruntime").InferenceSession(written, providers=["CPUExecutionProvider"])
    return written, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


if __name__ == "__main__":
    sys.exit(main())
