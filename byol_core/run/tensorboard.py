"""The numbers and pictures of a run for TensorBoard, where that is installed; nothing of it is imported otherwise."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def check_tensorboard() -> None:
    """Raises: ValueError when TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--tensorboard: {error} - pip install tensorboard, or leave --tensorboard out") from error


class Board:
    """Event files in a run folder. A failure to write them is said once, ends them, and never stops the run.

    update: where the run goes on; what an earlier session wrote of later updates is hidden. say: takes a warning.
    """

    def __init__(self, folder: Path, update: int, say: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._say = say
        self._writer: "SummaryWriter | None" = None
        try:
            self._writer = SummaryWriter(str(folder), purge_step=update + 1)
        except OSError as error:
            self._give_up(error)

    def scalars(self, update: int, values: Mapping[str, object]) -> None:
        """The numbers among `values`, in the file when this returns."""
        def write(writer: "SummaryWriter") -> None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(name, value, update)
            writer.flush()
        self._attempt(write)

    def picture(self, update: int, path: Path) -> None:
        """The picture in `path`, if there is one, under its name without the suffix."""
        if path.exists():
            self._attempt(lambda writer: writer.add_image(path.stem, np.asarray(Image.open(path)), update, dataformats="HWC"))

    def close(self) -> None:
        self._attempt(lambda writer: writer.close())

    def _attempt(self, write: "Callable[[SummaryWriter], object]") -> None:
        try:
            if self._writer is not None:
                write(self._writer)
        except Exception as error:  # of a library that is not ours, on any file system
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        self._say(f"warning: nothing more is written for TensorBoard ({type(error).__name__}: {error}) - the run goes on")
