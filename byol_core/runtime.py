"""Where and in what precision a run computes: device, autocast, gradient scaling, and the step that may be refused."""

import contextlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from byol_core.cuda_graph import MicroBatch, Recorded, Recorder
from byol_core.small_maps import use_products_for_small_maps
from byol_core.system.distributed import ALONE, Processes

# By the beginnings of torchvision's names. On a CPU, depthwise convolutions are faster in float32 than in bf16, and these
# networks up to 1.8 times as fast with channels last as without; of the others in float32, those that gain by that.
DEPTHWISE = ("efficientnet_b", "mnasnet", "mobilenet", "shufflenet")
CHANNELS_LAST_IN_FLOAT32 = (*DEPTHWISE, "conv6", "densenet", "regnet")
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
SKIPS_IN_A_ROW = 20  # a scaler that starts at 2**16 has reached 2**-4 by then: the gradients themselves are not finite


class NonFiniteError(FloatingPointError):
    """The loss or a gradient is NaN or infinite; the weights are still those of the last good update.

    late: whether it was noticed one update later, which has not been made.
    """

    def __init__(self, message: str, late: bool = False) -> None:
        super().__init__(message)
        self.late = late


def choose_device(asked: str, processes: Processes = ALONE) -> tuple[torch.device, str]:
    """(device, why) for "auto", "cpu", "cuda", "cuda:N" or "mps"; with several processes each takes the GPU of its own.

    A GPU that is chosen by number becomes torch's current one.

    Raises: ValueError when the device that was asked for is not there, or cannot be shared.
    """
    if processes.several and asked not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {asked} with {processes.world_size} processes - use --device cuda or cpu")
    if asked == "auto":
        if torch.cuda.is_available():
            name, found = torch.cuda.get_device_name(), torch.cuda.device_count()
            more = "" if found == 1 or processes.several else (
                f", 1 of {found} GPUs: torchrun --nproc-per-node={found} train.py ... uses all")
            return torch.device("cuda", torch.cuda.current_device()), name + more
        if torch.backends.mps.is_available():
            return torch.device("mps"), "Apple GPU"
        return torch.device("cpu"), "no CUDA found"
    if asked == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device()), "as asked"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ValueError(f"--device {asked} is not a device - use auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {asked} is not supported - use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ValueError(f"--device {asked}: {torch.cuda.device_count()} CUDA devices found - use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: no Apple GPU found - use --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device, "as asked"


def choose_precision(asked: str, device: torch.device, arch: str = "") -> tuple[torch.dtype | None, str]:
    """(autocast dtype or None for float32, why). arch: torchvision's name of the network, or "conv6".

    "auto" takes bfloat16 where the hardware multiplies it natively, float16 on older CUDA devices, else float32, which
    conv6 and, on a CPU, depthwise convolutions are faster in.
    """
    if asked != "auto":
        return AMP_DTYPES[asked], "as asked"
    if arch == "conv6":
        return None, "the network is small"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "native on this GPU"
        return torch.float16, "this GPU has no native bf16"
    if device.type == "cpu" and arch.startswith(DEPTHWISE):
        return None, "faster for depthwise convolutions on a CPU"
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return torch.bfloat16, "native on this CPU"
    return None, f"no native bf16 on this {device.type.upper()}"


def allow_tf32(device: torch.device) -> bool:
    """Let matrix products and convolutions that remain in float32 use TF32, on GPUs; whether that was done."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    return True


def prefers_channels_last(device: torch.device, amp_dtype: torch.dtype | None, arch: str = "") -> bool:
    """Whether a network is faster with the channels of a pixel side by side: on CUDA, in bfloat16, and some in float32."""
    on_cpu = device.type == "cpu" and arch.startswith(CHANNELS_LAST_IN_FLOAT32)
    return device.type == "cuda" or amp_dtype == torch.bfloat16 or on_cpu


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has AMX or AVX512-BF16 instructions; False where this torch cannot say."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)


class Statistics:
    """A model's buffers, such as batch norm's statistics: kept after an applied step, restored after a skipped one."""

    def __init__(self, model: nn.Module) -> None:
        groups: dict[object, list[Tensor]] = {}  # alike ones, which are copied at once
        for buffer in filter(_is_written_in_place, model.buffers()):
            groups.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        self.buffers = list(groups.values())
        self.kept = [[buffer.clone() for buffer in group] for group in self.buffers]

    def keep(self) -> None:
        _copy(self.kept, self.buffers)

    def restore(self) -> None:
        _copy(self.buffers, self.kept)


def _is_written_in_place(buffer: Tensor) -> bool:
    """Whether it can be; constants may be expanded, quantized or made under inference_mode, and are not written."""
    if is_lazy(buffer) or buffer.layout != torch.strided or buffer.is_quantized or buffer.is_inference() or buffer.is_conj():
        return False
    return all(step > 0 or size <= 1 for step, size in zip(buffer.stride(), buffer.shape))


@torch.no_grad()
def _copy(places: list[list[Tensor]], values: list[list[Tensor]]) -> None:
    for group, new in zip(places, values):
        torch._foreach_copy_(group, new)


class Runtime:
    """The device, the precision, the gradient scaler and the processes of a run.

    device: where the model lives. amp_dtype: torch.bfloat16, torch.float16 (with a gradient scaler) or None for float32.
    channels_last: memory layout of images; faster for convolutions on GPUs and in bf16. processes: those that share each
    batch; on CUDA batch norm then takes its statistics over all of them. cuda_graph: on a CUDA device, forward and backward
    are recorded as a CUDA graph, which small networks and images gain most by: see `cuda_graph.Recorded` for when that is
    right. Several processes compute without.
    """

    def __init__(self, device: torch.device | str = "cpu", amp_dtype: torch.dtype | None = None,
                 channels_last: bool = False, processes: Processes = ALONE, cuda_graph: bool = False) -> None:
        self.device = torch.device(device)
        self.amp_dtype = amp_dtype
        self.channels_last = channels_last
        self.processes = processes
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == torch.float16)
        self.skipped_in_a_row = 0
        self.cuda_graph = cuda_graph and self.device.type == "cuda" and not processes.several
        self.recorder: Recorder | None = None  # of CUDA graphs, another than torch's
        self.reads_late = self.device.type == "cuda"  # whether the host learns one step later if a step was finite
        self._in_doubt: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._has_momentum = False
        self._statistics: Statistics | None = None

    def place_model(self, model: nn.Module) -> None:
        """Move `model` to the device, in the run's memory layout, with batch norm over all processes where that exists."""
        if self.processes.several and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.to(self.device)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.device.type == "cpu":
            use_products_for_small_maps(model)

    def place(self, view: Tensor) -> Tensor:
        memory_format = torch.channels_last if self.channels_last and view.dim() == 4 else torch.preserve_format
        return view.to(self.device, non_blocking=True, memory_format=memory_format)

    def distribute(self, model: nn.Module) -> nn.Module:
        """`model`, whose backward pass averages gradients over the processes; its parameters stay where they are.

        In float16, where steps are skipped, its batch norm's statistics are put back after such a step from now on.
        """
        self._statistics = Statistics(model) if self.scaler.is_enabled() else None
        self._in_doubt = None  # of a training before this one
        if not self.processes.several:
            return model
        options = inspect.signature(DistributedDataParallel).parameters
        keyword = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"  # the older name
        keep_buffers: dict[str, Any] = {keyword: False}
        distributed = DistributedDataParallel(model, gradient_as_bucket_view=True, **keep_buffers)
        # It puts gradients together anew after its first exchange, and sums of three or more depend on their places there:
        # a resumed run is exact only if that exchange is none of an update.
        distributed.reducer.prepare_for_backward([])
        torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum().backward()
        model.zero_grad(set_to_none=True)
        return distributed

    @contextlib.contextmanager
    def micro_batch(self, distributed: nn.Module, seed: int, last: bool) -> Iterator[None]:
        """Around forward and backward: torch's generators begin anew from `seed`, but for the CPU's outside of it, from which
        loaders draw; and only the last micro-batch of an update exchanges gradients."""
        alone = isinstance(distributed, DistributedDataParallel) and not last
        before = torch.get_rng_state()
        torch.manual_seed(seed)
        try:
            with distributed.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
                yield
        finally:
            torch.set_rng_state(before)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        if self.amp_dtype is None:
            yield
        else:
            with torch.autocast(self.device.type, dtype=self.amp_dtype):
                yield

    def recorded(self, compute: MicroBatch, parameters: Iterable[Tensor]) -> MicroBatch:
        """`compute`, or what records it as a CUDA graph and replays that."""
        return Recorded(compute, parameters, self.device, self.recorder) if self.cuda_graph else compute

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer, loss: Tensor) -> bool:
        """Apply one optimizer update and clear the gradients; False when it was skipped, as float16 may overflow.

        loss: the unscaled loss.
        On CUDA the result arrives one step later, except in float16 or with optimizers that cannot skip: a step that is not
        finite changes no weight, and the next one says so.
        Raises: NonFiniteError, before any weight has changed, when the loss or a gradient is not finite (in float16: when
        that was so for many steps in a row).
        """
        self.confirm()
        self.scaler.unscale_(optimizer)
        finite_there = _gradients_are_finite(optimizer) & torch.isfinite(loss)
        # A fused optimizer that skips its very first update starts from uninitialised momentum, so that one is waited for.
        if self.reads_late and self._has_momentum and not self.scaler.is_enabled() and _skips_on_device(optimizer):
            _step_unless(optimizer, ~finite_there)
            self._in_doubt = _sent_to_host(finite_there)
            finite = True
        else:
            finite = bool(finite_there)
            if finite:
                self.scaler.step(optimizer)
                self._has_momentum = True
        if self.scaler.is_enabled():
            self.scaler.update()
        if self._statistics is not None:
            self._statistics.keep() if finite else self._statistics.restore()
        optimizer.zero_grad(set_to_none=True)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= (SKIPS_IN_A_ROW if self.scaler.is_enabled() else 1):
            raise NonFiniteError("the loss or a gradient is not finite" if not self.scaler.is_enabled() else
                                 f"the loss or a gradient was not finite for {SKIPS_IN_A_ROW} steps in a row")
        return finite

    def confirm(self) -> None:
        """Make sure that the latest step was finite; call it before anything is made of its weights.

        Raises: NonFiniteError when it was not, and has changed no weight.
        """
        in_doubt, self._in_doubt = self._in_doubt, None
        if in_doubt is not None:
            finite, arrived = in_doubt
            if arrived is not None:
                arrived.synchronize()
            if not finite:
                raise NonFiniteError("the loss or a gradient is not finite", late=True)


def _gradients_are_finite(optimizer: Optimizer) -> Tensor:
    """() bool, by one norm over all gradients: NaN and infinity anywhere make it so."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.isfinite(nn.utils.get_total_norm(gradients))


def _skips_on_device(optimizer: Optimizer) -> bool:
    """Whether it looks at `found_inf` itself: ours says so, and torch's fused optimizers do it for the gradient scaler."""
    return getattr(optimizer, "skips_on_device", False) or getattr(optimizer, "_step_supports_amp_scaling", False)


def _step_unless(optimizer: Optimizer, skip: Tensor) -> None:
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def _sent_to_host(finite: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The tensor on its way to the host, and when it has arrived there."""
    if finite.device.type != "cuda":
        return finite, None
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(finite, non_blocking=True)
    stream = torch.cuda.current_stream(finite.device)  # which need not be that of torch's current device
    return host, stream.record_event()


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
