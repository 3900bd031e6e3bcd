"""What records, reports and checkpoints take of the training loop: a run on the digits at its defaults, parts of it timed.

    python -m tests.bench.cost --threads 1
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import train
from byol_core import run
from byol_core.metrics import RunLog
from byol_core.outcome import Outcome
from byol_core.run import Run
from tests.bench.table import arguments, environment, markdown, show

PARTS = {"records: losses, health, speed": (RunLog, "step"), "report.html on the way": (Outcome, "report_under_way"),
         "kNN on the way (only with --eval-every)": (Outcome, "measure_on_the_way"),
         "checkpoints, one per epoch": (Run, "save"),
         "the whole loop": (run, "train")}


@contextmanager
def timed(owner: object, name: str, seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds what calls of `owner.name` take on the clock to `seconds[part]`."""
    function: Callable = getattr(owner, name)

    def measured(*arguments: object, **options: object) -> object:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[part] += time.perf_counter() - began

    with mock.patch.object(owner, name, measured):
        yield


def main() -> None:
    options = arguments(__doc__)
    seconds = dict.fromkeys(PARTS, 0.0)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            stack.enter_context(timed(owner, name, seconds, part))
        code = train.main(["--out", f"{place}/run", "--device", options.device, "--epochs", "60"])
    assert code == 0
    whole = seconds["the whole loop"]
    rows = [(part, f"{value:.2f}", f"{value / whole:.2%}") for part, value in seconds.items()]
    show("What a run takes beside training, conv6 on the digits, 60 epochs",
         f"{environment(options.device)}\n\n{markdown(('part', 'seconds', 'of the loop'), rows)}", options.write)


if __name__ == "__main__":
    main()
