"""Who is to blame when processes wait for each other: judged from their signs of life."""

import os
import threading

import pytest
import torch.distributed as dist

from byol_core.system import watch
from byol_core.system.watch import FAILED, WAITING, WORKING, Sign, Watch


def judged(signs: list[Sign], later: list[Sign], capsys: pytest.CaptureFixture[str]) -> str:
    """What a process whose steps take a second says of these signs of three processes."""
    one = Watch(dist.HashStore(), 0, 3)
    one.longest = 1.0
    one._judge(signs, later)
    said = capsys.readouterr().err
    assert (one.store.get(FAILED).decode() if one.store.check([FAILED]) else "") == said.replace("error: ", "0 ").rstrip("\n")
    return said


def signs(*states: tuple[str, float], number: int = 5) -> list[Sign]:
    return [Sign(number, state, seconds) for state, seconds in states]


@pytest.mark.parametrize("after, said", [
    (((WAITING, 22), (WORKING, 23), (WAITING, 22)), "error: rank 1 of 3 is stuck: nothing has moved there for 23 s\n"),
    (((WAITING, 22), (WORKING, 19), (WAITING, 22)), ""),  # slow, but not too slow
    (((WAITING, 22), (WAITING, 22), (WAITING, 22)), ""),  # somebody will move
    (((WAITING, 601), (WAITING, 602), (WAITING, 603)), "error: all 3 processes have waited for each other for 601 s\n"),
    (((WAITING, 22), (WORKING, 23), ("unlimited", 99)), ""),  # the first one evaluates
])
def test_a_process_that_works_far_too_long_is_stuck(after: tuple[tuple[str, float], ...], said: str, capsys) -> None:
    assert judged(signs(*after, number=5), signs(*after, number=8), capsys) == said


def test_a_process_without_new_signs_is_silent(capsys) -> None:
    before = signs((WAITING, 22), (WAITING, 22), (WAITING, 22), number=5)
    after = [Sign(8, WAITING, 25), Sign(5, WAITING, 22), Sign(8, WAITING, 25)]
    assert judged(before, after, capsys) == "error: rank 1 of 3 is silent: frozen, or cut off\n"


def test_a_process_that_was_asked_to_stop_is_not_missed(capsys) -> None:
    one, other = Watch(dist.HashStore(), 0, 2), signs((WAITING, 1), (WAITING, 1))
    Watch(one.store, 1, 2).asked_to_stop(look=False)
    one.longest = 1.0
    one._judge(other, [Sign(8, WAITING, 1), other[1]])
    assert capsys.readouterr().err == "" and not one.store.check([FAILED])


@pytest.mark.parametrize("state, looks", [(WAITING, 4), ("unlimited", 10)])
def test_others_are_looked_at_when_waiting_long_and_when_busy(state: str, looks: int, monkeypatch, capsys) -> None:
    one = Watch(dist.HashStore(), 0, 2)
    one.state, one.longest = state, 1.0
    monkeypatch.setattr(one, "_signs", lambda: [Sign(len(one._seen), state, 99), Sign(3, WAITING, 1)])
    for number in range(1, looks + 1):
        assert not one.store.check([FAILED]), number
        one._look_around(16.5 + number)  # the limit is 20
    assert capsys.readouterr().err == "error: rank 1 of 2 is silent: frozen, or cut off\n"


def test_an_exchange_is_waiting_and_what_comes_after_it_is_not() -> None:
    one = Watch(dist.HashStore(), 0, 2)
    one.enter(WORKING)
    with one.waiting():
        assert one.state == WAITING
    assert one.state == WORKING


def test_the_limit_follows_the_longest_step() -> None:
    one = Watch(dist.HashStore(), 0, 2)
    assert one.limit == 600
    for longest, limit in ((0.1, 20), (2.0, 20), (30.0, 300)):
        one.longest = longest
        assert one.limit == limit


def test_the_first_process_to_fail_has_the_word() -> None:
    store = dist.HashStore()
    first, second = Watch(store, 0, 2), Watch(store, 1, 2)
    assert second.fail(ValueError("no luck")) == ("rank 1 of 2: no luck", True)
    assert first.fail(RuntimeError("Connection closed by peer")) == ("rank 1 of 2: no luck", False)


def test_of_two_processes_that_say_the_same_one_has_the_word() -> None:
    store = dist.HashStore()
    said = [Watch(store, rank, 3)._have_the_word("rank 1 of 3 is gone") for rank in (0, 2)]
    assert said == [("rank 1 of 3 is gone", True), ("rank 1 of 3 is gone", False)]


def test_a_process_that_another_one_waits_for_in_vain_is_ended(monkeypatch) -> None:
    """With its last words written, even when it can do nothing itself."""
    store = dist.HashStore()
    one = Watch(store, 0, 2)
    ended = threading.Event()
    words: list[str] = []
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()
        one._ended.set()

    monkeypatch.setattr(watch, "GRACE_S", 0.0)
    monkeypatch.setattr(watch, "PUBLISH_S", 0.01)
    monkeypatch.setattr(os, "_exit", leave)
    one.last_words = words.append
    one.start()
    Watch(store, 1, 2).fail(ValueError("no luck"))
    assert ended.wait(10)
    one.join()
    assert codes[0] == 1 and words[0] == "rank 1 of 2: no luck"
