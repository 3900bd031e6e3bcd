"""`python -m tests`: the whole check - tests, style, types - in one command, with the seconds of each part.

`--fast` leaves the slow tests out. The ten slowest tests are listed.
"""

import importlib.util
import os
import subprocess
import sys
import time

from byol_core.system.command import usable_cpus


def main() -> int:
    fast = "--fast" in sys.argv[1:]
    pytest = [sys.executable, "-m", "pytest", "-q", "--durations=10", *(["-m", "not slow"] if fast else [])]
    environment = dict(os.environ)
    if importlib.util.find_spec("xdist"):  # of the slow tests, some wait for processes of theirs
        pytest += ["-n", str(usable_cpus() + (not fast)), "--dist", "loadgroup"]
        environment["OMP_NUM_THREADS"] = "1"
    parts = {"pytest": pytest, "flake8": [sys.executable, "-m", "flake8", "byol_core", "tests", "train.py"],
             "mypy": [sys.executable, "-m", "mypy", "byol_core", "train.py", "tests/bench"]}
    failed, seconds = [], []
    for name, words in parts.items():
        began = time.monotonic()
        if subprocess.call(words, env=environment):
            failed.append(name)
        seconds.append(f"{name} {time.monotonic() - began:.0f} s")
    print(", ".join(seconds))
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed" + (", slow tests left out" if fast else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
