"""`python -m byol_core.embed`: the features of every image of a folder in one file, written as they come."""

import json
import shutil
import sys
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from byol_core.system.command import Parser, backbone_parser, file_to_write, run_in_two_parts, say

if TYPE_CHECKING:  # torch is loaded when there is something to do: --help need not wait
    from torch import Tensor

    from byol_core.images.image_set import ImageSet
    from byol_core.pretrained import Pretrained
    from byol_core.runtime import Runtime

CHUNK = 10_000  # names written at a time


@dataclass
class Embedding:
    """What is to be embedded, found to be in order."""

    pretrained: "Pretrained"
    files: "ImageSet"
    runtime: "Runtime"
    workers: int
    out: Path


def build_parser() -> Parser:
    parser = backbone_parser("python -m byol_core.embed", "Write the features of every image of a folder to one .npz file: "
                             "embeddings, names, and, where there are class sub-folders, labels and classes (to be read: odd "
                             "bytes of a folder's name are written as escapes there).")
    parser.add_argument("--out", default="embeddings.npz", metavar="FILE", help="where to (default: embeddings.npz)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    return run_in_two_parts(lambda: prepare(options), carry_out, options.debug)


def prepare(options: Namespace) -> Embedding:
    """Everything that can be wrong is found here, before any image goes through the network."""
    from byol_core.images.image_set import scan
    from byol_core.pretrained import open_backbone

    out = file_to_write("--out", options.out)
    if out.suffix != ".npz":
        raise ValueError(f"--out {out}: embeddings are written in NumPy's format - give a name that ends in .npz")
    pretrained, runtime, workers = open_backbone(options, say)
    runtime.place_model(pretrained.backbone)
    files = scan(options.data)
    for line in files.remarks:
        say(f"warning: {line}")
    return Embedding(pretrained, files, runtime, workers, out)


def carry_out(embedding: Embedding) -> None:
    """Rows go to a nameless file beside --out as they are made, and from there into it: memory does not grow with them.

    Raises: ValueError for a feature that is not finite, TooManyBadFilesError, OSError; --out is then as it was.
    """
    import torch
    from tqdm import tqdm

    from byol_core.evaluate.features import embed_batches
    from byol_core.system.console import printable
    from byol_core.system.files import atomic_write
    from byol_core.views.pixels import load_images

    files, pretrained, out = embedding.files, embedding.pretrained, embedding.out
    found = torch.zeros(len(files), dtype=torch.bool)
    with tqdm(total=len(files), unit="img", disable=None) as bar, tempfile.TemporaryFile(dir=out.absolute().parent) as rows:
        data = load_images(files, "cpu", embedding.runtime.device, lambda line: bar.write(line, file=sys.stderr))[0]
        for indices, features in embed_batches(pretrained.backbone, data, pretrained.recipe, torch.arange(len(files)),
                                               embedding.runtime, embedding.workers):
            finite = torch.isfinite(features).all(1)
            if not finite.all():
                name = printable(files.name(int(indices[finite.int().argmin()])))
                raise ValueError(f"the features of {name} are not finite, so nothing was written - use an earlier checkpoint")
            rows.write(features.numpy().tobytes())
            found[indices] = True
            bar.update(len(indices))
        if not found.any():
            raise ValueError(f"none of the {len(files)} images of {files.given} can be read")
        rows.seek(0)
        atomic_write(out, lambda file: _assemble(file, rows, embedding, found.nonzero().flatten(), data.bad.reasons))
    sys.stdout.write(f"{out}: {int(found.sum())} embeddings of {pretrained.feature_dim} numbers"
                     f"{f'; {len(data.bad.reasons)} files could not be read' if data.bad.reasons else ''}\n")


def _assemble(file: IO[bytes], rows: IO[bytes], embedding: Embedding, indices: "Tensor", bad: Mapping[int, str]) -> None:
    """A zip of .npy files, each a header and its numbers; `rows`, and the names, are copied piece by piece."""
    import numpy as np

    files, pretrained = embedding.files, embedding.pretrained
    about = {"checkpoint": str(pretrained.path), "network": pretrained.network, "arch": pretrained.arch,
             "data": files.given}
    with zipfile.ZipFile(file, "w") as archive:
        with _entry(archive, "embeddings", "<f4", (len(indices), pretrained.feature_dim)) as entry:
            shutil.copyfileobj(rows, entry)
        _write_texts(archive, "names", indices.tolist(), files.name)
        if files.labels is not None:
            with _entry(archive, "labels", "<i8", (len(indices),)) as entry:
                entry.write(files.labels[indices].numpy().astype("<i8").tobytes())
            _write_texts(archive, "classes", range(len(files.classes)), lambda label: files.classes[label])
        _write_texts(archive, "skipped", sorted(bad), files.name)
        with _entry(archive, "about", f"<U{len(json.dumps(about))}", ()) as entry:
            entry.write(np.array(json.dumps(about)).tobytes())


def _write_texts(archive: zipfile.ZipFile, name: str, keys: Sequence[int], text: Callable[[int], str]) -> None:
    """An array of strings as they are, odd bytes of file names as the surrogates that os.fsencode turns back."""
    import numpy as np

    kind = f"<U{max((len(text(key)) for key in keys), default=1)}"
    with _entry(archive, name, kind, (len(keys),)) as entry:
        for start in range(0, len(keys), CHUNK):
            entry.write(np.array([text(key) for key in keys[start:start + CHUNK]], dtype=kind).tobytes())


def _entry(archive: zipfile.ZipFile, name: str, kind: str, shape: tuple[int, ...]) -> IO[bytes]:
    """An open .npy of the archive, its header written; texts are compressed, as most of their bytes are zero."""
    import numpy as np

    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED if "U" in kind else zipfile.ZIP_STORED
    entry = archive.open(info, "w", force_zip64=True)
    np.lib.format.write_array_header_1_0(entry, {"descr": kind, "fortran_order": False, "shape": shape})
    return entry


if __name__ == "__main__":
    sys.exit(main())
