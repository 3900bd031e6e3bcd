"""A signal is answered between steps; outside of them, or the second time, at once."""

import os
import signal

import pytest

from byol_core.system.signals import Stopped, StopRequest

CASES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGHUP, 143)]


@pytest.mark.parametrize("number, code", CASES)
def test_a_signal_between_steps_waits_to_be_asked_for(number: int, code: int) -> None:
    request = StopRequest()
    request.listen()
    with request.during_steps():
        os.kill(os.getpid(), number)
    assert request.signal == number and Stopped(number).code == code


@pytest.mark.parametrize("number, code", CASES)
def test_a_second_signal_stops_at_once(number: int, code: int) -> None:
    request = StopRequest()
    request.listen()
    with request.during_steps():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), number)
    assert stopped.value.code == code


def test_a_signal_after_the_steps_stops_at_once_but_after_an_error_in_one_it_waits() -> None:
    request = StopRequest()
    request.listen()
    with pytest.raises(OSError), request.during_steps():
        raise OSError
    os.kill(os.getpid(), signal.SIGTERM)  # what is left may be about to be saved
    request = StopRequest()
    request.listen()
    with request.during_steps():
        pass
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_closed_terminal_changes_nothing_for_a_command_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopRequest().listen()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_signal_outside_of_training_stops_at_once() -> None:
    request = StopRequest()
    request.listen()
    with pytest.raises(Stopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert request.signal == signal.SIGTERM  # should something have swallowed the exception, the next step will see it
