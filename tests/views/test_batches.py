"""Batches made ahead on a GPU, with stand-ins for one, and the time that training waits for them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from byol_core.views import batches
from byol_core.views.batches import MadeAhead, TimedBatches
from tests.helpers.pictures import CPU


class Fake:
    """Stands in for CUDA's streams and for views: says what happens, in order."""

    def __init__(self, events: list[str], name: str) -> None:
        self.events, self.name, self.device = events, name, torch.device("cuda")

    def wait_stream(self, other: "Fake") -> None:
        self.events.append(f"{self.name} waits for {other.name}")

    def record_stream(self, stream: "Fake") -> None:
        self.events.append(f"{self.name} used on {stream.name}")

    def to(self, device: torch.device, non_blocking: bool = False) -> "Fake":
        assert non_blocking and device.type == "cuda"
        self.events.append(f"{self.name} copied on {self.current.name}")
        return self

    current: "Fake"


def test_each_batch_is_made_aside_while_the_one_before_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    aside, main = Fake(events, "aside"), Fake(events, "main")
    Fake.current = main

    @contextlib.contextmanager
    def stream(chosen: Fake) -> Iterator[None]:
        Fake.current = chosen
        yield
        Fake.current = main

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", stream)

    def make() -> Iterator[Any]:
        for number in (1, 2):
            events.append(f"{number} made on {Fake.current.name}")
            yield Fake(events, f"{number}a"), Fake(events, f"{number}b")

    for view, _ in iter(MadeAhead(make(), aside), None):  # type: ignore[attr-defined]
        assert Fake.current is main
        events.append(f"{view.name} trained on")  # type: ignore[attr-defined]
    assert events == ["aside waits for main", "1 made on aside", "1a copied on aside", "1b copied on aside",
                      "main waits for aside", "1a used on main", "1b used on main",
                      "2 made on aside", "2a copied on aside", "2b copied on aside", "1a trained on",
                      "main waits for aside", "2a used on main", "2b used on main", "2a trained on"]


class Source:
    """Two batches, each of which the host makes in 3 s of `clock`."""

    device = CPU

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        for _ in range(2):
            self.clock[0] += 3
            yield Fake([], "1"), Fake([], "2")


def test_the_time_that_a_cpu_waits_for_views_is_theirs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waited = [0.0], []
    monkeypatch.setattr(batches.time, "monotonic", lambda: clock[0])
    timed = TimedBatches(Source(clock))  # type: ignore[arg-type]
    for _ in timed.epoch(0):
        clock[0] += 10  # the step
        waited.append(timed.take_waited())
    assert waited == [3, 3] and timed.take_waited() == 0  # and none is made ahead, which the first would wait for


def test_a_cuda_device_waits_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device waits for the first views and those made ahead of it; then its own work takes longer than the host's."""
    host, waited = [0.0], []
    device = {"idle from": 0.0, "knows": 0.0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            device["idle from"] = self.at = max(device["idle from"], host[0])

        def query(self) -> bool:
            return self.at <= device["knows"]

        def elapsed_time(self, end: "Event") -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    Fake.current = Fake([], "main")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Fake.current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    timed = TimedBatches(Source(host))  # type: ignore[arg-type]
    timed.aside = Fake([], "aside")  # type: ignore[assignment]
    for _ in timed.epoch(0):
        host[0] += 1
        device["idle from"] += 8  # its step begins at 6, when the host has made two batches, and ends at 14
        waited.append(timed.take_waited())
    assert waited == [0, 0]  # not there yet
    device["knows"] = 100
    assert timed.take_waited() == 6 and timed.take_waited() == 0
