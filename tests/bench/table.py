"""What the benchmarks share: timing side by side, the environment in one line, a table to print or to keep.

    python -m tests.bench.table FILE    append the tables in a file that --json has written to RESULTS.md
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("RESULTS.md")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # as a run chooses it


def parse(parser: argparse.ArgumentParser, rounds: int = 15, threads: int | None = None) -> argparse.Namespace:
    """What is given for the options of `parser` and for those that the benchmarks share. rounds, threads: the defaults."""
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--threads", type=int, default=threads or torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=rounds, help="times each row is measured; the median counts")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no round that would not end within so many "
                        "seconds of measuring; one is always made (default: no limit)")
    add_output(parser)
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be 1 or more")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: no CUDA device found")
    torch.set_num_threads(options.threads)
    return options


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where the table goes beside the terminal: see `show`."""
    parser.add_argument("--write", action="store_true", help=f"append the table to {RESULTS.name} beside this file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the table and its numbers to FILE, a line of JSON")


def side_by_side(functions: Mapping[str, Callable[[], object]], device: str, rounds: int, warm_up: int = 2,
                 clock: Callable[[], float] = time.perf_counter, seconds: float = math.inf,
                 memory: dict[str, float] | None = None) -> dict[str, float]:
    """Median milliseconds of each function; every round runs all of them, so that a slow moment hits all alike.

    One for which the GPU's memory is too small is named and left out. seconds: no round is begun that would not end within
    them, if it took as long as the last one; one is always made. memory: takes the GB of the GPU's memory that each
    function's last call needed beyond what lay there before.
    """
    on_gpu = device.startswith("cuda")
    times: dict[str, list[float]] = {name: [] for name in functions}
    began = time.perf_counter()
    for number in range(warm_up + rounds):
        round_began = time.perf_counter()
        for name in list(times):
            wait_for(device)
            if memory is not None and on_gpu:
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
            start = clock()
            try:
                functions[name]()
            except torch.OutOfMemoryError as error:
                print(f"{name} left out ({str(error).splitlines()[0]})\n")
                del times[name]
                continue
            wait_for(device)
            if number >= warm_up:
                times[name].append(1000 * (clock() - start))
            if memory is not None and on_gpu:
                memory[name] = (torch.cuda.max_memory_allocated(device) - before) / 1e9
        now = time.perf_counter()
        if number >= warm_up and now - began + now - round_began > seconds:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def wait_for(device: torch.device | str) -> None:
    """Until all that it was given to do is done; a CPU has always done it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds_on_gpu(function: Callable[[], object], device: str, calls: int = 15) -> float:
    """The median that a call takes on the GPU alone, by the GPU's clock; the host's own work is hidden behind a pause."""
    times = []
    for _ in range(calls):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            torch.cuda._sleep(20_000_000)  # cycles of the GPU, about 10 ms: meanwhile the host queues the call
            start.record()
            function()
            end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def commit() -> str:
    """What is measured: as git describes it, or as BYOL_COMMIT says where there is no repository."""
    if "BYOL_COMMIT" in os.environ:
        return os.environ["BYOL_COMMIT"]
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


def show(title: str, text: str, options: argparse.Namespace, **numbers: object) -> None:
    """Print a section, and keep it where `add_output`'s options say. numbers: what else belongs into the line of JSON."""
    section = f"## {title}\n\n{text}\n"
    print(section)
    if options.write:
        append_to_results(section)
    append_json(options, title=title, section=section, **numbers)


def append_json(options: argparse.Namespace, **values: object) -> None:
    if options.json is not None:
        with options.json.open("a") as file:
            file.write(json.dumps(values) + "\n")


def append_to_results(section: str) -> None:
    with RESULTS.open("a") as file:
        file.write(("" if file.tell() else "# Benchmarks, newest last\n") + f"\n{section}")
    print(f"appended to {RESULTS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    for line in parser.parse_args().file.read_text().splitlines():
        values = json.loads(line)
        for section in filter(None, [values.get("section"), *values.get("sections", [])]):
            append_to_results(section)


if __name__ == "__main__":
    main()
