"""Is what a device computes right? One check at a call; how far results lie apart is said in numbers.

    python -m tests.bench.right tests --device cuda                 every test marked gpu
    python -m tests.bench.right digits --device cuda --amp bf16     the sample lands where it does on a CPU, and is read there
    python -m tests.bench.right resume --device cuda --images DIR   stopped and resumed equals never stopped
    python -m tests.bench.right torchrun --device cuda --images DIR one process of torchrun's equals none
    python -m tests.bench.right compile --device cuda               --compile computes the same, and how long it takes to start

Exit code 0: right; 1: wrong, with the reason in the last line; 2: cannot be tried.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.utils._pytree import tree_leaves

import train
from byol_core.run import log
from byol_core.runtime import Runtime, allow_tf32, choose_precision, prefers_channels_last
from byol_core.system import distributed as processes
from tests.bench import rivals
from tests.bench.end_to_end import CASES
from tests.bench.loader import find
from tests.bench.table import append_json, environment, parse
from tests.helpers.children import At
from tests.helpers.digits import BAND, BAND_EPOCHS, outside_the_band
from tests.helpers.forking import REPOSITORY

IN_SUMMARY = ("linear_5", "knn", "spread")  # of the band, what summary.json has; its rank is of other images
ON_CPU = 0.02  # by which accuracies of the same weights may differ on another device: some 7 of the 360 digits measured on
STOPPED_AFTER, EPOCHS, PER_EPOCH = 5, 3, 4  # updates before the stop; of a run that is stopped
NOISE = 10.0  # times as far as two runs alike lie apart, where they do, a resumed one may lie
# Shares by which losses may differ: of the first update, by rounding alone; some updates on, as differences grow.
FIRST_LOSS, LATER_LOSS = 0.01, 0.1
LEAST_NOISE = 0.01  # of gradients, by which those of a compiled network in float32 may be off


class Outcomes:
    """A plugin of pytest that counts."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.names[report.outcome].append(report.nodeid)


def tests(options: argparse.Namespace) -> str:
    """Every test marked gpu; where there is none, that they are skipped."""
    outcomes = Outcomes()
    code = pytest.main(["-v", "-m", "gpu", "-p", "no:cacheprovider", *marked_files()], plugins=[outcomes])
    found = {name: len(names) for name, names in outcomes.names.items()}
    append_json(options, **found, failed_tests=outcomes.names["failed"])
    if code != 0 or not found["passed" if options.device.startswith("cuda") else "skipped"]:
        raise SystemExit(f"wrong: {found}; pytest's exit code is {int(code)}")
    return ", ".join(f"{number} {name}" for name, number in found.items())


def marked_files() -> list[str]:
    """The files with tests marked gpu; collecting those of all the others takes longer than running these."""
    return [str(path) for path in sorted((REPOSITORY / "tests").rglob("test_*.py")) if "@pytest.mark.gpu" in path.read_text()]


def digits(options: argparse.Namespace) -> str:
    """The main job on the sample lands in the CPU's band of accuracies, and its checkpoint gives them on a CPU, too."""
    run_of("--data", "digits", "--epochs", options.epochs, "--device", options.device, "--amp", options.amp, "--out", "run")
    summary = json.loads(Path("run", "summary.json").read_text())
    scores = {name: summary[name] for name in IN_SUMMARY}
    there = evaluated_on_a_cpu(Path("run"))
    here = {"knn_20": summary["knn"], "linear": summary["linear"]}
    apart = max(abs(there[name] - value) for name, value in here.items())
    append_json(options, environment=environment(options.device), precision=summary["amp"], **scores, **here,
                **{f"{name}_on_a_cpu": there[name] for name in here}, megabytes_at_the_peak=summary["peak_memory_mb"],
                images_per_second=summary["images_per_second"])
    if not apart <= ON_CPU:
        raise SystemExit(f"wrong: the checkpoint gives {there} on a CPU and {here} on {options.device}")
    outside = outside_the_band(scores, IN_SUMMARY) if options.epochs == BAND_EPOCHS else []
    if outside:
        raise SystemExit(f"wrong: {', '.join(outside)} outside the CPU's band: {scores}, not in {BAND}")
    return f"{scores}; on a CPU {there}; {summary['peak_memory_mb']} MB"


def evaluated_on_a_cpu(run: Path) -> dict[str, float]:
    """The accuracies of a run on the digits by the evaluation, in a process that sees no GPU."""
    sample = Path("runs", "data", "digits")
    subprocess.run([sys.executable, "-m", "byol_core.evaluate", "--checkpoint", str(run / "last.pt"), "--device", "cpu",
                    "--data", str(sample / "train"), "--eval-data", str(sample / "test"), "--json", "on-cpu.json"],
                   check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)})
    return {result["metric"]: result["accuracy"] for result in json.loads(Path("on-cpu.json").read_text())["results"]
            if result["network"] == "online"}


def resume(options: argparse.Namespace) -> str:
    """A run that was stopped and resumed ends with the weights of one that never was; or no further off than that one from
    itself, where the device does not repeat its results."""
    words = short_run(options)
    run_of(*words, "--out", "whole")
    run_of(*words, "--out", "again")
    with pytest.MonkeyPatch.context() as patched:
        At("byol_core.run.run:Run.after_step", STOPPED_AFTER, "SIGTERM").arrange(patched.setattr)
        run_of(*words, "--out", "parts", code=128 + signal.SIGTERM)
    run_of(*words, "--out", "parts", "--resume")
    whole, again, parts = (state_of(Path(name)) for name in ("whole", "again", "parts"))
    noise, apart = furthest_apart(whole, again), furthest_apart(whole, parts)
    append_json(options, environment=environment(options.device), resumed_differs_by=apart, repeated_differs_by=noise)
    if not apart <= NOISE * noise:  # also of NaN
        raise SystemExit(f"wrong: resumed differs by {apart:.2g} from never stopped, which repeated differs by {noise:.2g}")
    return f"resumed differs by {apart:.2g} of the length of weights or optimizer, repeated by {noise:.2g} (0: in no bit)"


def torchrun(options: argparse.Namespace) -> str:
    """A process group of one, with DistributedDataParallel and batch norm over all processes, trains as one without."""
    words = [*short_run(options), "--amp", "off"]
    log.RECORD_EVERY = 1
    run_of(*words, "--out", "alone")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m",
                    "tests.bench.right", "member", *words, "--out", "group"], check=True,
                   env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    alone, group = (losses_of(Path(name)) for name in ("alone", "group"))
    first, last = (abs(alone[place] - group[place]) / alone[place] for place in (0, -1))
    apart = furthest_apart(*(state_of(Path(name)) for name in ("alone", "group")))
    append_json(options, environment=environment(options.device), losses_alone=alone, losses_in_a_group=group,
                weights_differ_by=apart)
    if len(alone) != len(group) or not (first <= FIRST_LOSS and last <= LATER_LOSS):
        raise SystemExit(f"wrong: the losses are {group} in a process group and {alone} without")
    return f"losses differ by {first:.2g} of themselves at first and {last:.2g} in the end; weights by {apart:.2g}"


def member(words: Sequence[str]) -> int:
    """train.py as one of several processes, though it be the only one. Not a check; `torchrun` starts it."""
    log.RECORD_EVERY = 1
    backends: set[str] = set()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(processes.Processes, "several", property(lambda self: True))
        patched.setattr(processes, "join", lambda device: processes.join_group(device, 1))
        patched.setattr(nn.SyncBatchNorm, "forward", lambda norm, images: synchronised(norm, images, backends))
        code = train.main(words)
    print(f"batch norm was taken over all processes by {backends or 'none of the backends'}")
    on_gpu = words[words.index("--device") + 1] != "cpu"
    return code or int(on_gpu and backends != {"ProcessGroupNCCL"})


def synchronised(norm: nn.SyncBatchNorm, images: Tensor, backends: set[str]) -> Tensor:
    """Its forward pass, which in a group of one would not exchange anything. Source: torch.nn.SyncBatchNorm.forward.

    backends: takes the name of the one that serves the images' device.
    """
    if not norm.training:
        return nn.functional.batch_norm(images, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    assert norm.num_batches_tracked is not None and dist.group.WORLD is not None
    backends.add(type(dist.group.WORLD._get_backend(images.device)).__name__)
    norm.num_batches_tracked.add_(1)
    return SyncBatchNorm.apply(images, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, norm.momentum,
                               dist.group.WORLD, 1)


def compile(options: argparse.Namespace) -> str:
    """With --compile, loss and gradients are as near to those in float32 as without it, from the same weights and views.

    What torch has compiled it finds again: with the same network and batch, the benchmarks begin sooner after this.
    """
    size, small_stem, _ = CASES[options.case]
    device = torch.device(options.device)
    amp_dtype = choose_precision("auto", device, options.arch)[0]
    channels_last = prefers_channels_last(device, amp_dtype, options.arch)
    before = torch.get_float32_matmul_precision()
    losses: list[float] = []
    gradients: list[Tensor] = []
    seconds: list[float] = []
    for dtype, compiled in ((None, False), (amp_dtype, False), (amp_dtype, True)):
        runtime = Runtime(device, dtype, channels_last)
        model = rivals.new_byol(options.arch, small_stem, size, runtime)
        (views,) = rivals.random_views(1, options.batch, size, runtime)
        if compiled:
            allow_tf32(device)  # as a run does: what is compiled under other settings is not found again
            model.online.compile()
            model.target.compile()
        began = time.perf_counter()
        losses.append(float(rivals.forward_and_backward(model, runtime, *views)))
        seconds.append(time.perf_counter() - began)
        gradients.append(torch.cat([p.grad.flatten() for p in model.online.parameters() if p.grad is not None]))
    torch.set_float32_matmul_precision(before)
    off, off_compiled = (float((some - gradients[0]).norm() / gradients[0].norm()) for some in gradients[1:])
    append_json(options, environment=environment(options.device), losses=losses, gradients_off_float32=off,
                gradients_off_float32_compiled=off_compiled, seconds=seconds[1], seconds_compiled=seconds[2])
    if not (abs(losses[2] - losses[0]) <= FIRST_LOSS * losses[0] and off_compiled <= 2 * max(off, LEAST_NOISE)):
        raise SystemExit(f"wrong: compiled, the loss is {losses[2]:.5f} and the gradients are {off_compiled:.2g} of their "
                         f"length off those in float32; uncompiled {losses[1]:.5f} and {off:.2g}")
    return (f"gradients are {off_compiled:.2g} of their length off those in float32, and {off:.2g} uncompiled; a first step "
            f"took {seconds[2]:.0f} s compiled and {seconds[1]:.1f} s otherwise")


def short_run(options: argparse.Namespace) -> list[str]:
    """Options of train.py for EPOCHS epochs of PER_EPOCH updates on images of a folder, shown small."""
    found = find(options.images, PER_EPOCH * options.batch)
    batch = min(options.batch, len(found) // PER_EPOCH)
    listing = Path("images.txt").resolve()
    listing.write_text("".join(f"{path}\n" for path in found[:PER_EPOCH * batch]))
    return ["--data", str(listing), "--epochs", str(EPOCHS), "--batch-size", str(batch), "--arch", options.arch,
            "--image-size", str(CASES[options.case][0]), "--device", options.device, "--workers", "2", "--no-eval",
            *(["--cuda-graph"] if options.cuda_graph else [])]


def run_of(*words: object, code: int = 0) -> None:
    """train.py in this process. Raises: SystemExit unless it ends with `code`."""
    ended = train.main([str(word) for word in words])
    if ended != code:
        raise SystemExit(f"wrong: train.py {' '.join(map(str, words))} ended with exit code {ended}, not {code}")


def losses_of(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def state_of(run: Path) -> dict[str, Tensor]:
    """What training changes, as a checkpoint has it: all numbers of the networks, and all that the optimizer keeps."""
    state = torch.load(run / "last.pt", weights_only=True, map_location="cpu")
    return {part: torch.cat([leaf.flatten().double() for leaf in tree_leaves(state[part]) if isinstance(leaf, Tensor)])
            for part in ("model", "optimizer")}


def furthest_apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """|a - b| / |a| by Euclidean norms, of the part in which it is larger; 0 only where no bit differs, NaN where one is."""
    return max((0.0 if torch.equal(a, b) else float((a - b).norm() / a.norm()) for a, b in zip(one.values(), other.values())),
               key=lambda apart: math.inf if math.isnan(apart) else apart)


CHECKS = {check.__name__: check for check in (tests, digits, resume, torchrun, compile)}


def main() -> int:
    if sys.argv[1:2] == ["member"]:
        return member(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--images", type=Path, help="folder of images, for resume and torchrun")
    parser.add_argument("--case", choices=tuple(CASES), default="32s", help="view size, s for the small stem (default 32s)")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--batch", type=int, default=64, help="images (default 64)")
    parser.add_argument("--cuda-graph", action="store_true", help="train with --cuda-graph, for resume and torchrun")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="precision of the digits (default off)")
    parser.add_argument("--epochs", type=int, default=BAND_EPOCHS,
                        help=f"of the digits (default {BAND_EPOCHS}: only after so many are accuracies held against the band)")
    options = parse(parser)
    if options.check in ("resume", "torchrun") and options.images is None:
        parser.error(f"{options.check} needs --images")
    for name in ("images", "json"):  # as a check works in a folder of its own
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).resolve())
    with tempfile.TemporaryDirectory() as place:
        os.chdir(REPOSITORY if options.check == "tests" else place)
        try:
            print(f"right: {CHECKS[options.check](options)}")
        finally:
            os.chdir(REPOSITORY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
