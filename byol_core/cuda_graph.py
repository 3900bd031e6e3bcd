"""A computation recorded as a CUDA graph: its kernels, a thousand or more, are then launched at once."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording: libraries set themselves up, and torch.compile compiles
Views = tuple[Tensor, Tensor]
Kind = tuple[torch.Size, torch.dtype, torch.Size, torch.dtype]
MicroBatch = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # two views -> what was computed, detached
Recorder = Callable[[Callable[[], None], torch.device], Callable[[], object]]  # (work, device) -> what repeats it


class Recorded:
    """`compute(view1, view2)`, recorded after its third call and replayed from then on. Values are the same.

    Right for computations that launch the same kernels on the same memory each time: code in Python that runs beside them,
    such as a hook, runs in the first calls alone, and must not keep a tensor with its gradient function. The graph is for
    views of one shape, the first to have come three times; views of other shapes are computed without it.

    compute: returns tensors without a gradient function. parameters: those whose gradients it adds to. record: records work
    without doing it.
    Raises: RuntimeError when it cannot be recorded; torch cannot be relied upon in that process any more. Where it can be
    known before, a warning is given, and all is computed without the graph.
    """

    def __init__(self, compute: MicroBatch, parameters: Iterable[Tensor], device: torch.device,
                 record: "Recorder | None" = None) -> None:
        self.compute, self.parameters, self.device = compute, list(parameters), device
        self.record = record or record_on_cuda
        self.refused = False  # as the host must wait for the device in it
        self._calls: Counter[Kind] = Counter()
        self._kind: Kind | None = None  # of the views that the graph is for
        self._replay: Callable[[], object] | None = None
        self._views: Views
        self._gradients: list[Tensor | None]  # the graph adds to them
        self._outputs: tuple[Tensor, ...]

    def __call__(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, ...]:
        kind = view1.shape, view1.dtype, view2.shape, view2.dtype
        if self.refused or self._kind not in (None, kind):
            return self.compute(view1, view2)
        self._calls[kind] += 1
        if self._calls[kind] < WARM_UP:
            return self.compute(view1, view2)
        if self._kind is None:
            self._kind = kind
            return self._computed_before_recording(view1, view2)
        if self._replay is None:
            self._replay = self._recorded()
        for taken, given in zip(self._views, (view1, view2)):
            taken.copy_(given)
        self._put_gradients_back()
        self._replay()
        return tuple(output.clone() for output in self._outputs)  # the next replay writes over them

    def _computed_before_recording(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, ...]:
        """Computed without the graph for the last time: finds out if it can be recorded, and makes the memory for that."""
        outputs, self.refused = watched(lambda: self.compute(view1, view2), self.device)
        if self.refused:
            warnings.warn("no CUDA graph is made, as the network or the loss makes the host wait for the device", stacklevel=3)
            return outputs
        self._views = torch.empty_like(view1), torch.empty_like(view2)
        # Copies, as two parameters may have been given one tensor, to which each of them would add.
        self._gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in self.parameters]
        return outputs

    def _recorded(self) -> Callable[[], object]:
        self._put_gradients_back()
        cause: list[RuntimeError] = []

        def work() -> None:
            try:
                self._outputs = self.compute(*self._views)
            except RuntimeError as error:  # what torch then says of the recording that was cut off tells less
                cause.append(error)
                raise

        try:
            return self.record(work, self.device)
        except RuntimeError as error:
            first = cause[0] if cause else error
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise RuntimeError(f"the training step cannot be recorded as a CUDA graph - leave --cuda-graph out, or "
                               f"cuda_graph=False; torch says: {first}") from first

    def _put_gradients_back(self) -> None:
        """Where the graph adds to them, as they are set to None between updates."""
        away = [(parameter, gradient) for parameter, gradient in zip(self.parameters, self._gradients)
                if gradient is not None and parameter.grad is not gradient]
        if away:
            torch._foreach_zero_([gradient for _, gradient in away])
        for parameter, gradient in away:
            if parameter.grad is not None:  # put there by someone
                gradient.add_(parameter.grad)
            parameter.grad = gradient


def record_on_cuda(work: Callable[[], None], device: torch.device) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    # Threads of data workers' batches may use the device meanwhile: only what this one does is to be recordable.
    # The outer stream is the one that is put back, also where torch leaves its own behind after an error.
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(torch.cuda.current_stream(device)), \
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


def watched(call: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[tuple[Tensor, ...], bool]:
    """(its outputs, whether the host waited for the device, as for a number that Python looks at)."""
    if device.type != "cuda":
        return call(), False
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            outputs = call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [warning for warning in said if "synchronizing CUDA operation" in str(warning.message)]
    for warning in said:
        if warning not in waits and "Synchronization debug mode" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return outputs, bool(waits)
