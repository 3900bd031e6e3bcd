"""Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal as a request that a run answers when its state is whole."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


def exit_code(number: int) -> int:
    return 130 if number == signal.SIGINT else 143


def end_at_once() -> None:
    """Until somebody listens, a signal ends the process without a word: the libraries that are being loaded fail anyhow."""
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), lambda number, frame: os._exit(exit_code(number)))


class Stopped(BaseException):
    """A signal asked the run to stop. code: the process's exit code.

    Like KeyboardInterrupt it is no Exception, so that nothing that guards against broken files takes it for one.
    """

    def __init__(self, number: int, whom: str = "") -> None:
        super().__init__(signal.Signals(number).name + whom)
        self.code = exit_code(number)


class StopRequest:
    """Remembers a signal for whoever asks between two steps; outside of steps, or asked twice, it raises Stopped at once.

    patient: asked twice, it waits all the same: a launcher passes on to its processes what a terminal has sent them already.
    signal: the number of the signal that came, or None.
    """

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.signal: int | None = None
        self._somebody_will_ask = False

    def listen(self) -> None:
        """Handle the signals of this process from now on; for the entry point alone."""
        for name in SIGNALS:
            if name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup wants it to change nothing
                signal.signal(getattr(signal, name), self._handle)

    @contextlib.contextmanager
    def during_steps(self) -> Iterator[None]:
        """Signals wait to be asked for; after an error they go on to wait, as there may be something to save."""
        self._somebody_will_ask = True
        yield
        self._somebody_will_ask = False  # outside of steps a signal stops at once

    def ignore(self) -> None:
        """The process is about to end; a further signal changes nothing."""
        for name in SIGNALS:
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = self.signal is None, number  # kept even if what it interrupts swallows the exception
        if not self._somebody_will_ask or not first and not self.patient:
            raise Stopped(number)
