"""What the benchmarks share: timing side by side, the environment in one line, a table to print or to keep."""

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("RESULTS.md")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # as a run chooses it


def arguments(description: str | None, images: str | None = None) -> argparse.Namespace:
    """The options of a benchmark. images: what --images is for, where there is such an option."""
    parser = argparse.ArgumentParser(description=description)
    if images is not None:
        parser.add_argument("--images", type=Path, metavar="DIR", help=images)
    return parse(parser)


def parse(parser: argparse.ArgumentParser, rounds: int = 15, threads: int | None = None) -> argparse.Namespace:
    """The options of a benchmark that has some of its own. rounds, threads: the defaults."""
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--threads", type=int, default=threads or torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=rounds, help="times each row is measured; the median counts")
    parser.add_argument("--write", action="store_true", help=f"append the table to {RESULTS.name} beside this file")
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be 1 or more")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: no CUDA device found")
    torch.set_num_threads(options.threads)
    return options


def side_by_side(functions: Mapping[str, Callable[[], object]], device: str, rounds: int, warm_up: int = 2,
                 clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Median milliseconds of each function; every round runs all of them, so that a slow moment hits all alike.

    One for which the GPU's memory is too small is named and left out.
    """
    wait = partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warm_up + rounds):
        for name in list(times):
            wait()
            start = clock()
            try:
                functions[name]()
            except torch.OutOfMemoryError as error:
                print(f"{name} left out ({str(error).splitlines()[0]})\n")
                del times[name]
                continue
            wait()
            if number >= warm_up:
                times[name].append(1000 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def working_memory(function: Callable[[], object], device: str) -> float:
    """GB of the GPU's memory that a call takes beyond what lay there before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def commit() -> str:
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True,
                              text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no commit"


def environment(device: str, *packages: str) -> str:
    """Date, commit, device, versions and the load of the machine in one line."""
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        name = torch.cuda.get_device_name(device) + (f", {peak:.1f} GB of its memory at the peak" if peak else "")
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} thread(s)"
    versions = [f"{package} {importlib.metadata.version(package)}" for package in ("torch", *packages)]
    python = f"Python {platform.python_version()}"
    load = [f"load {os.getloadavg()[0]:.1f} (1 min)"] if hasattr(os, "getloadavg") else []
    return ", ".join((str(datetime.date.today()), f"commit {commit()}", name, python, *versions, *load))


def markdown(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) + ("---:",) * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(title: str, text: str, write: bool) -> None:
    """Print a section, and append it to the results when asked to."""
    section = f"## {title}\n\n{text}\n"
    print(section)
    if write:
        with RESULTS.open("a") as file:
            file.write(("" if file.tell() else "# Benchmarks, newest last\n") + f"\n{section}")
        print(f"appended to {RESULTS}")
