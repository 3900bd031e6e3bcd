"""Everything that only a GPU can show, in one call that ends in time: is it right, is it fast, does it learn?

    python -m tests.bench.gpu --images path/to/cifar10 --photos path/to/photos --out DIR
    python -m tests.bench.gpu ... --only learns lightly --seconds 900 --minutes 5      some of the stages
    python -m tests.bench.gpu ... --device cpu                                         a rehearsal at small scale

Stages run in order of worth, each in a process of its own with a time limit of its own. When one ends, DIR/results.jsonl gets
a line of what it measured; DIR/log.txt has what all of them print, as they print it. One that fails, or is not done at its
limit, is named and keeps none of the others from running. Limits are given for --seconds 480, and in proportion for others.
See tests/bench/README.md for what each number means.
"""

import argparse
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from byol_core.runtime import choose_precision
from byol_core.system.command import usable_cpus
from tests.bench import BEGAN
from tests.bench.stages import FAILED, LATE, LEFT_OUT, PASSED, TO_END_S, Log, Result, Stage, run
from tests.bench.table import commit, markdown

USUAL_SECONDS = 480.0  # in all, for which the stages' limits are given
MEASURING_S = 75.0  # seconds that `learns` needs beside training: reading images, measuring
TO_MEASURE = 2 / 3  # of a benchmark's limit; in the rest it loads torch, reads images and starts workers


@dataclass(frozen=True)
class Bar:
    """What a number of a stage should reach on an H100 or H200. number: where it stands among the stage's numbers."""

    stage: str
    number: tuple[str, ...]
    what: str
    least: float | None = None
    most: float | None = None

    def judge(self, numbers: dict[str, Any]) -> dict[str, object] | None:
        value: Any = numbers
        for key in self.number:
            value = value.get(key)
            if value is None:
                return None
        reached = (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
        return {"what": self.what, "value": value, "least": self.least, "most": self.most, "reached": reached}


BARS = [Bar("ema", ("share_of_copy_bandwidth",), "ema_update, share of the copy bandwidth", least=0.9),
        Bar("cifar", ("times_lightly",), "ResNet-18 on CIFAR, times lightly's loop", least=8.0),
        Bar("photos", ("share_of_bare_step",), "ResNet-50 at 224 pixels, share of the bare step", least=0.95),
        Bar("photos", ("waits",), "ResNet-50 at 224 pixels, waiting for views", most=0.03),
        Bar("learns", ("seed 0", "accuracies", "kNN 20, last"), "CIFAR-10, weighted kNN of 20", least=0.85)]


def stages(options: argparse.Namespace) -> list[Stage]:
    """All stages in order of worth; on a CPU the same at small scale, but for float16, which CPUs are slow in."""
    full, scale = options.device.startswith("cuda"), options.seconds / USUAL_SECONDS
    on: list[object] = ["--device", options.device]
    images, photos = ["--images", options.images / "train"], ["--images", options.photos]
    network = ["--arch", "resnet18" if full else "conv6"]
    small = [*network, "--case", "32s" if full else "32"]
    batch = ["--batch", 64 if full else 8]
    workers = ["--workers", 16] if full else []
    cifar = [*images, *small, *workers, *(["--batch", 512, "--updates", 50] if full else ["--batch", 8, "--updates", 2])]
    large = [*photos, *workers, *(["--case", "224", "--arch", "resnet50", "--batch", 128, "--updates", 24] if full else
                                  [*network, "--case", "32", "--batch", 8, "--updates", 2])]
    no_bf16 = "" if full or choose_precision("auto", torch.device("cpu"))[0] else "bf16 is slow on this CPU"

    def right(name: str, check: str, *words: object, missing: str = "") -> Stage:
        return Stage("right", name, lambda seconds: ["-m", "tests.bench.right", check, *on, *words], 90.0 * scale,
                     beside=True, missing=missing, environment=threads)

    def fast(name: str, bench: str, limit: float, *words: object, missing: str = "") -> Stage:
        rounds = [] if full else ["--rounds", 1]
        return Stage("fast", name, lambda seconds: ["-m", f"tests.bench.{bench}", *on, *words, *rounds,
                                                    "--seconds", f"{TO_MEASURE * seconds:.1f}"], limit * scale,
                     missing=missing)

    threads = {"OMP_NUM_THREADS": str(max(1, usable_cpus() // at_once())),  # or they keep each other from getting on
               "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    both = ["--compile", "--cuda-graph"] if full else ["--compile"]
    no_compiler = "" if full or shutil.which("g++") else "no C++ compiler, which --compile needs on a CPU"
    found = [
        *([right("compile-large", "compile", "--case", "224", "--arch", "resnet50", "--batch", 128)] if full else []),
        right("tests", "tests"),
        *(right(f"digits-{amp}", "digits", "--amp", amp, *([] if full else ["--epochs", 1]),
                missing=no_bf16 if amp == "bf16" else "") for amp in ("bf16", "fp16", "off") if full or amp != "fp16"),
        right("resume", "resume", *images, *small, *batch),
        right("resume-crops", "resume", *photos, *network, "--case", "64" if full else "32", *batch),
        *([right("resume-graph", "resume", *images, *small, *batch, "--cuda-graph")] if full else []),
        right("torchrun", "torchrun", *images, *small, *batch),
        right("compile-small", "compile", *small, "--batch", 512 if full else 8, missing=no_compiler),
        fast("ema", "ema", 30.0),
        fast("lars", "lars", 20.0),
        fast("cifar", "end_to_end", 50.0, *cifar),
        fast("photos", "end_to_end", 65.0, *large),
        *([fast("cifar-graph", "end_to_end", 30.0, *cifar, "--cuda-graph", "--no-peers")] if full else []),
        fast("cifar-compiled", "end_to_end", 60.0, *cifar, *both, "--no-peers", missing=no_compiler),
        *([fast("photos-compiled", "end_to_end", 75.0, *large, *both, "--no-peers")] if full else []),
    ]
    minutes = options.minutes or (None if full else 0.01)

    def accuracy(seconds: float, *words: object) -> list[object]:
        length = minutes or max(seconds - MEASURING_S, 1.0) / 60
        return ["-m", "tests.bench.accuracy", "cifar10", "--images", options.images, "--minutes", f"{length:.3f}", "--quick",
                *words, *on, "--out", options.work,
                *(["--arch", "resnet18", "--small-stem"] if full else ["--arch", "conv6", "--batch-size", "8"])]

    needed = MEASURING_S + 60 * (minutes or 0.5) if full else 1.0
    no_lightly = "" if importlib.util.find_spec("lightly") else "lightly is not installed"
    no_minutes = "" if minutes else "learns takes all the time that is left; --minutes gives both the same"
    return [*found, Stage("learns", "learns", accuracy, None, needed),
            Stage("learns", "lightly", lambda seconds: accuracy(seconds, "--lightly"), None, needed,
                  missing=no_lightly or no_minutes)]


def at_once() -> int:
    """How many stages that time nothing run side by side."""
    return max(1, usable_cpus() * 5 // 8)


class Results:
    """results.jsonl, the lines on the terminal, and what is said in the end."""

    def __init__(self, out: Path) -> None:
        self.path = out / "results.jsonl"
        self.found: list[dict[str, Any]] = []

    def keep(self, stage: Stage, result: Result) -> None:
        bars = [judged for bar in BARS if bar.stage == stage.name and (judged := bar.judge(result.get("numbers", {})))]
        line = {"stage": stage.name, "group": stage.group, **result, **({"bars": bars} if bars else {})}
        self.found.append(line)
        self.write(line)
        took = f" after {result['seconds']:.0f} of {result['limit']:.0f} s" if "seconds" in result else ""
        tells = stage.group == "right" or result["status"] != PASSED  # the others have tables, which come in the end
        says = f": {result['last_line']}" if tells else ""
        print(f"{stage.group}: {stage.name}: {result['status']}{took}{says}", flush=True)

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def say(self) -> None:
        for line in self.found:
            for section in line.get("sections", []):
                print(f"\n{section}", end="")
        numbers = {line["stage"]: line.get("numbers", {}) for line in self.found}
        bare = numbers.get("photos", {}).get("milliseconds_of_bare_step")
        for stage, ours in (("ema", "**ema_update**"), ("lars", "**LARS**")):
            value = numbers.get(stage, {}).get("milliseconds_of_the_device", {}).get(ours)
            if bare and value:
                print(f"\n{ours.strip('*')}: {value:.3f} ms, {value / bare:.2%} of the bare step of photos, {bare:.1f} ms")
        rows = [(bar["what"], f"{bar['value']:.3g}", f"{bar['least']:g} or more" if bar["least"] is not None else
                 f"{bar['most']:g} or less", "reached" if bar["reached"] else "not reached")
                for line in self.found for bar in line.get("bars", [])]
        if rows:
            print("\n" + markdown(("bars, made for an H100 or H200", "measured", "bar", ""), rows))
        for status in (FAILED, LATE, LEFT_OUT):
            names = [line["stage"] for line in self.found if line["status"] == status]
            if names:
                print(f"\n{status}: {', '.join(names)}")

    @property
    def well(self) -> bool:
        """Whether nothing failed or had to be ended; what was left out for want of time does not count."""
        return all(line["status"] in (PASSED, LEFT_OUT) for line in self.found)


def chosen(found: list[Stage], only: list[str] | None) -> list[Stage]:
    """The stages of these names or groups. Raises: ValueError for a name that there is not."""
    names = {word for stage in found for word in (stage.name, stage.group)}
    unknown = [word for word in only or [] if word not in names]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: the stages are {', '.join(stage.name for stage in found)}; "
                         f"their groups {', '.join(dict.fromkeys(stage.group for stage in found))}")
    return [stage for stage in found if only is None or {stage.name, stage.group} & set(only)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="CIFAR-10: a folder with train/<class>/ and test/<class>/")
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs as JPEG files")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl and log.txt, which are begun anew")
    parser.add_argument("--seconds", type=float, default=USUAL_SECONDS, help="in which all ends (default %(default)g)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal at small scale (default cuda)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages or groups of stages to run (default: all)")
    parser.add_argument("--minutes", type=float, help="of training in the stages learns and lightly (default: learns takes "
                        "all that is left, and lightly, the same minutes of its recipe, is left out)")
    parser.add_argument("--commit", help="what is measured, where the folder is no git repository")
    options = parser.parse_args(arguments)
    for folder in (options.images / "train", options.images / "test", options.photos):
        if not folder.is_dir():
            parser.error(f"no folder {folder}")
    if options.seconds <= TO_END_S:
        parser.error(f"--seconds must be above {TO_END_S:g}")
    if options.minutes is not None and options.minutes <= 0:
        parser.error("--minutes must be above 0")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: no CUDA device found; --device cpu rehearses at small scale")
    options.images, options.photos = options.images.resolve(), options.photos.resolve()
    return options


def main(arguments: Sequence[str] | None = None, first: Sequence[Stage] = (), began: float | None = None) -> int:
    """Exit codes: 0 no stage failed or had to be ended, 1 some did, 2 wrong options.

    first: stages before all others. began: when, by time.monotonic; otherwise now.
    """
    began = time.monotonic() if began is None else began
    options = parse(arguments)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        options.work = Path(work)
        try:
            todo = chosen([*first, *stages(options)], options.only)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        options.out.mkdir(parents=True, exist_ok=True)
        results, log = Results(options.out), Log(options.out / "log.txt")
        for path in (results.path, log.path):
            path.write_bytes(b"")
        environment = {"BYOL_COMMIT": options.commit or commit()}
        results.write({"stage": "begun", "commit": environment["BYOL_COMMIT"], "torch": torch.__version__,
                       "device": options.device, "seconds": options.seconds, "stages": [stage.name for stage in todo]})
        left = options.seconds - (time.monotonic() - began)
        run(todo, results.keep, log, left, Path(work), at_once(), environment)
    results.say()
    return 0 if results.well else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stages are ended, too
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a stage that hangs is aborted, and its memory is of no use
    sys.exit(main(began=BEGAN))
