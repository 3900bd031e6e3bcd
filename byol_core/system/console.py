"""What goes wrong with a machine rather than with a run, in one line that says what to do about it."""

import contextlib
import os
from typing import TextIO

# How the allocators of CUDA and MPS, torch's own for the CPU, and Python say that there is no memory left.
NO_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")
SELF_EXPLAINING = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError)  # errors whose text is a sentence


def printable(text: str) -> str:
    """`text` with everything that a terminal, JSON or HTML could stumble over written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def one_line(message: object) -> str:
    """Its text, line breaks as spaces, and printable."""
    return printable(" ".join(str(message).splitlines()))


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY_WORDS))


def own_words(error: Exception) -> str:
    """What the error itself says, with its type where that says more than the words do."""
    if isinstance(error, NotImplementedError) and "MPS" in str(error):
        return f"{str(error).partition('. ')[0]} - use --device cpu"
    return str(error) if isinstance(error, SELF_EXPLAINING) else f"{type(error).__name__}: {error}"


def in_plain_words(error: Exception, device: str, batch_size: int | None = None, accum_steps: int = 1,
                   mixed_precision: bool = False) -> str:
    """The line to print for an error. batch_size, accum_steps: what was computed with; None before anything was."""
    if not is_out_of_memory(error):
        return own_words(error)
    if batch_size is None:
        on_cpu = device == "cpu" or isinstance(error, MemoryError) or "CPUAllocator" in str(error)
        where, other = ("the CPU", "") if on_cpu else ("the device" if device == "auto" else device, ", or --device cpu")
        return (f"out of memory on {where} before training - try a smaller --arch, --hidden-dim or --image-size, --views cpu"
                f"{other}")
    smaller = [f"--batch-size {batch_size // 2}"] if batch_size >= 4 else []
    in_parts = [f"--accum-steps {2 * accum_steps} (the same batch in smaller parts)"] if batch_size >= 4 * accum_steps else []
    precision = [] if mixed_precision or device == "cpu" else ["--amp bf16"]
    return (f"out of memory on {device} at batch {batch_size} - try "
            + ", ".join([*smaller, *in_parts, *precision] or ["--views cpu or a smaller --arch"]))


def show(stream: TextIO, text: str) -> None:
    """Write `text` for the person. A console that is gone (a closed terminal, `| head`) stops no run."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # what it still holds would fail again, at the latest at the end
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
