"""What tests/data/format1/last.pt was written by: `python -m tests.helpers.format1`, once. It is not to be written again
when the code changes: every later version must load it and go on from it.
"""

import signal
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from torch import nn

import train
from byol_core.run import setup
from byol_core.run.run import Run

PLACE = Path(__file__).parents[1] / "data" / "format1" / "last.pt"
STOPPED_AT, UPDATES = 4, 6
OPTIONS = ["--epochs", "2", "--arch", "conv6", "--image-size", "16", "--batch-size", "4", "--hidden-dim", "16",
           "--projection-dim", "8", "--optimizer", "lars", "--workers", "0", "--device", "cpu", "--amp", "off", "--seed", "5"]


def tiny_backbone(name: str, small_images: bool = False, image_size: int | None = None) -> tuple[nn.Module, int]:
    """In the place of conv6, to keep the file small."""
    return nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 8, 3, stride=2), bn1=nn.BatchNorm2d(8), relu1=nn.ReLU(),
                                     pool=nn.AdaptiveAvgPool2d(2), flatten=nn.Flatten())), 32


def write_images(folder: Path) -> Path:
    """Twelve images of two classes, with the same names, which are part of a run's identity, and pixels for ever."""
    y, x = np.mgrid[:16, :16]
    for number in range(12):
        pixels = np.stack([x * 16, y * 16, (x * y + 20 * number) % 256], axis=2).astype(np.uint8)
        path = folder / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def main() -> int:
    after_step = Run.after_step

    def stop(self: Run, progress, step) -> None:  # type: ignore[no-untyped-def]
        if progress.updates == STOPPED_AT:
            self.stop.signal = signal.SIGTERM
        after_step(self, progress, step)

    with tempfile.TemporaryDirectory() as place, mock.patch.object(setup, "build_backbone", tiny_backbone), \
            mock.patch.object(Run, "after_step", stop):
        data, out = write_images(Path(place) / "imgs"), Path(place) / "out"
        if train.main(["--data", str(data), "--out", str(out), *OPTIONS]) != 143:
            return 1
        PLACE.parent.mkdir(parents=True, exist_ok=True)
        PLACE.write_bytes((out / "last.pt").read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
