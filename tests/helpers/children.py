"""The command in processes of its own, killed, signalled or hindered at a chosen moment; not a test."""

import functools
import os
import pkgutil
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.helpers.forking import PATIENCE_S, Forked

SMALL = ["--arch", "conv6", "--hidden-dim", "16", "--projection-dim", "8", "--image-size", "16", "--batch-size", "4",
         "--device", "cpu"]


@dataclass(frozen=True)
class At:
    """What happens at the `number`-th call (from 1) of `place`, "module:attribute", before it or after it.

    what: a signal's name, for the process itself; "group SIGTERM" and the like for all that it has started, too; or a
    function of no arguments, "module:attribute".
    """

    place: str
    number: int
    what: str
    after: bool = False

    def arrange(self, replace: Callable[[Any, str, Any], None] = setattr) -> None:
        module, _, path = self.place.partition(":")
        *owners, name = path.split(".")
        owner = pkgutil.resolve_name(f"{module}:{'.'.join(owners)}" if owners else module)
        original: Callable[..., Any] = getattr(owner, name)
        calls = 0

        @functools.wraps(original)
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.number and not self.after:
                self.happen()
            result = original(*args, **options)
            if calls == self.number and self.after:
                self.happen()
            return result

        replace(owner, name, counted)

    def happen(self) -> None:
        *group, name = self.what.split(" ")
        if ":" in name:
            pkgutil.resolve_name(name)()
        elif group:
            os.killpg(0, getattr(signal, name))
        else:
            os.kill(os.getpid(), getattr(signal, name))


@dataclass(frozen=True)
class Ended:
    """How a child ended; when it is there, nothing that the child started is left."""

    code: int
    errors: str

    def __post_init__(self) -> None:
        assert "Traceback" not in self.errors and "Exception ignored" not in self.errors, self.errors


def run_child(arguments: Sequence[object], moments: Sequence[At] = (), start_method: str = "fork") -> Ended:
    """Run train.py in the current folder, in a session of its own. start_method: of its data workers."""
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe, open(writing, "wb") as stderr, open(os.devnull, "w") as stdout:
        child = Forked("tests.helpers.children:_train", [os.getcwd(), [str(argument) for argument in arguments],
                                                         [asdict(moment) for moment in moments], start_method],
                       stdout, stderr)
        stderr.close()
        try:
            errors = _read_to_the_end(pipe.fileno())
        finally:
            child.kill_session()
        return Ended(child.wait(), errors)


def _read_to_the_end(pipe: int) -> str:
    """What is written until nobody is left who could write."""
    parts, until = list[bytes](), time.monotonic() + PATIENCE_S
    while True:
        ready = select.select([pipe], [], [], max(until - time.monotonic(), 0))[0]
        assert ready, f"a process is still there after {PATIENCE_S:.0f} s; so far: {b''.join(parts)!r}"
        part = os.read(pipe, 65536)
        if not part:
            return b"".join(parts).decode()
        parts.append(part)


def _train(folder: str, arguments: list[str], moments: list[dict[str, Any]], start_method: str) -> int:
    import torch.multiprocessing

    import train
    from byol_core.run import log

    os.chdir(folder)
    torch.multiprocessing.set_start_method(start_method, force=True)
    log.RECORD_EVERY = 2  # not only at the ends of these short epochs
    for moment in moments:
        At(**moment).arrange()
    return train.main(arguments)
