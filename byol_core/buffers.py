"""What a forward pass writes into a model beside its output, and how it is put back when the step comes to nothing."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from byol_core.runtime import NonFiniteError, Runtime


class Statistics:
    """The model's buffers, such as batch norm's statistics: what a step that is skipped or refused must not have changed.

    A forward pass writes into them before it is known whether the step is finite; leaving by an exception puts them back if
    it was not. runtime: knows whether the latest step was.
    """

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        self.runtime = runtime
        groups: dict[object, list[Tensor]] = {}  # alike ones, which are copied at once
        for buffer in filter(_is_written_in_place, model.buffers()):
            groups.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        self.buffers = list(groups.values())
        self.kept, self.kept_before = ([[buffer.clone() for buffer in group] for group in self.buffers] for _ in range(2))

    def __enter__(self) -> "Statistics":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NonFiniteError):
            self.restore(before=error.late)  # then they were kept once more since
        elif error is not None:
            try:
                self.runtime.confirm()
            except NonFiniteError:
                self.restore(before=True)

    def keep(self) -> None:
        """The step was applied, as far as is known."""
        self.kept, self.kept_before = self.kept_before, self.kept
        _copy(self.kept, self.buffers)

    def restore(self, before: bool = False) -> None:
        """As last kept, or, before, as kept the time before that."""
        _copy(self.buffers, self.kept_before if before else self.kept)


def _is_written_in_place(buffer: Tensor) -> bool:
    """Whether it can be; constants may be expanded, quantized or made under inference_mode, and are not written."""
    if is_lazy(buffer) or buffer.layout != torch.strided or buffer.is_quantized or buffer.is_inference() or buffer.is_conj():
        return False
    return all(step > 0 or size <= 1 for step, size in zip(buffer.stride(), buffer.shape))


@torch.no_grad()
def _copy(places: list[list[Tensor]], values: list[list[Tensor]]) -> None:
    for group, new in zip(places, values):
        torch._foreach_copy_(group, new)
