"""Who says why a run of several processes fails, and what the others say."""

import signal
from datetime import timedelta

import pytest
import torch.distributed as dist

from byol_core.system import distributed
from byol_core.system.distributed import NoAnswerError, Processes
from byol_core.system.signals import Stopped
from byol_core.views.workers import WorkerError

CLOSED = RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:14242")


def test_there_is_time_to_say_who_is_gone_before_torchrun_kills() -> None:
    """Which it does 30 s after one process has ended, by default."""
    assert distributed.GRACE_S <= 15


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "GRACE_S", 0.01)
    monkeypatch.delenv("BYOL_TIMEOUT_S", raising=False)


def test_one_that_gets_no_answer_says_so_at_once() -> None:
    """Before the others, whose connection to it is closed then, take it for dead."""
    class Store(dist.HashStore):
        def wait(self, keys: list[str], timeout: timedelta) -> None:
            raise AssertionError

    reason, ours, _ = Processes(0, 2, store=Store()).fail(RuntimeError("Application timeout caused pair closure"))
    assert ours and reason.startswith("another process has not answered for 600 s (noticed by rank 0 of 2)")


def test_the_first_process_to_fail_has_the_word() -> None:
    store = dist.HashStore()
    first, second = (Processes(rank, 2, store=store) for rank in (0, 1))
    assert second.fail(ValueError("no luck")) == ("rank 1 of 2: no luck", True, False)
    assert first.fail(CLOSED) == ("rank 1 of 2: no luck", False, False)
    assert first.fail(ValueError("none either")) == ("rank 1 of 2: no luck", False, False)


def test_a_lost_connection_waits_for_the_one_that_failed() -> None:
    """Which may be busy yet with saying so."""
    class Store(dist.HashStore):
        def wait(self, keys: list[str], timeout: timedelta) -> None:
            assert keys == ["failed"] and timeout == timedelta(seconds=0.01)
            Processes(1, 2, store=self).fail(ValueError("no luck"))

    assert Processes(0, 2, store=Store()).fail(CLOSED) == ("rank 1 of 2: no luck", False, False)


def test_those_that_lose_one_that_was_asked_to_stop_stop() -> None:
    store = dist.HashStore()
    assert Processes(1, 2, store=store).fail(Stopped(signal.SIGTERM)) == ("rank 1 of 2: SIGTERM", True, True)
    assert Processes(0, 2, store=store).fail(CLOSED) == ("rank 1 of 2: SIGTERM", False, True)


def test_those_that_torchrun_stops_as_another_one_failed_have_failed() -> None:
    store = dist.HashStore()
    assert Processes(1, 2, store=store).fail(ValueError("no luck")) == ("rank 1 of 2: no luck", True, False)
    assert Processes(0, 2, store=store).fail(Stopped(signal.SIGTERM)) == ("rank 1 of 2: no luck", False, False)


@pytest.mark.parametrize("error, said", [
    (CLOSED, "another process is gone (noticed by rank 2 of 3): killed, out of memory, or cut off"),
    (dist.DistNetworkError("No route to host"), "another process is gone (noticed by rank 2 of 3)"),
    (RuntimeError("[pair.cc:1] recvmsg: Connection timed out"), "another process is gone (noticed by rank 2 of 3)"),
    (RuntimeError("[buffer.cc:72] Timed out waiting 7000ms for recv operation to complete"),
     "another process has not answered for 7 s (noticed by rank 2 of 3): it hangs, or its machine is cut off"),
    (NoAnswerError(), "another process has not answered for 7 s (noticed by rank 2 of 3)"),
])
def test_of_two_that_notice_it_one_says_so(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYOL_TIMEOUT_S", "7")
    store = dist.HashStore()
    reason, ours, _ = Processes(2, 3, store=store).fail(error)
    assert ours and reason.startswith(said)
    assert Processes(0, 3, store=store).fail(error) == (reason, False, False)


@pytest.mark.parametrize("error", [ConnectionResetError("Connection reset by peer"), WorkerError("connection closed"),
                                   FileNotFoundError("runs/timeout was removed or replaced while the run went on"),
                                   RuntimeError("NCCL error: Duplicate GPU detected"),
                                   ValueError("no such folder: timed out")])
def test_what_no_process_is_to_blame_for_keeps_its_words(error: Exception) -> None:
    assert Processes(0, 2, store=dist.HashStore()).fail(error, f"{error}!") == (f"rank 0 of 2: {error}!", True, False)
