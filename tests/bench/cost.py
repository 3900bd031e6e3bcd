"""Where the time of a run goes: a run of the main job with its parts timed.

    python -m tests.bench.cost --epochs 60                                               the digits at their defaults
    python -m tests.bench.cost --data path/to/cifar10/train --image-size 32 --epochs 2   any options of train.py
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import train
from byol_core import training
from byol_core.networks import BYOL
from byol_core.run import run
from byol_core.run.log import RunLog
from byol_core.run.results import Results
from byol_core.run.run import Run
from byol_core.runtime import Runtime
from tests.bench.table import DEVICE, add_output, environment, markdown, show, wait_for

WHOLE = "the whole loop"
PARTS = {"forward": (BYOL, "forward"), "backward": (Runtime, "backward"), "finite check and optimizer": (Runtime, "step"),
         "EMA": (training, "ema_update"), "records: losses, health, speed": (RunLog, "step"),
         "report.html on the way": (Results, "report_under_way"),
         "kNN on the way (only with --eval-every)": (Results, "measure_on_the_way"),
         "checkpoints, one per epoch": (Run, "save"), WHOLE: (run, "train")}


def timed(function: Callable, seconds: dict[str, float], part: str) -> Callable:
    """The function, adding to `seconds[part]` what its calls take on the clock, with what they give a GPU to do."""
    def measured(*arguments: object, **options: object) -> object:
        wait_for(DEVICE)
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            wait_for(DEVICE)
            seconds[part] += time.perf_counter() - began

    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser)
    options, passed_on = parser.parse_known_args()
    seconds = dict.fromkeys(PARTS, 0.0)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), seconds, part)))
        code = train.main(["--out", f"{place}/run", *passed_on])
        summary = json.loads((Path(place) / "run" / "summary.json").read_text())
    assert code == 0
    whole = seconds.pop(WHOLE)
    seconds["waiting for views"] = summary["wait_fraction"] * summary["seconds"]
    seconds["all else"] = whole - sum(seconds.values())
    rows = [(part, f"{value:.2f}", f"{value / whole:.2%}") for part, value in sorted(seconds.items(), key=lambda row: -row[1])]
    show("Where the time of a run goes", f"`python -m tests.bench.cost {' '.join(passed_on)}`: "
         f"{environment(summary['device'])}\n\n{summary['images_per_second']:.0f} images/s\n\n"
         f"{markdown(('part', 'seconds', 'of the loop'), [*rows, (WHOLE, f'{whole:.2f}', '100.00%')])}", options)


if __name__ == "__main__":
    main()
