"""`python -m tests`: the whole check - tests, style, types - in one command. `--fast` leaves the slow tests out."""

import importlib.util
import os
import subprocess
import sys

from byol_core.runtime import usable_cpus


def main() -> int:
    fast = "--fast" in sys.argv[1:]
    pytest = [sys.executable, "-m", "pytest", "-q", *(["-m", "not slow"] if fast else [])]
    environment = dict(os.environ)
    if importlib.util.find_spec("xdist"):  # many tests wait for processes of theirs, so there are more workers than CPUs
        pytest += ["-n", str(2 * usable_cpus()), "--dist", "loadgroup"]
        environment["OMP_NUM_THREADS"] = "1"
    codes = {"pytest": subprocess.call(pytest, env=environment),
             "flake8": subprocess.call([sys.executable, "-m", "flake8", "byol_core", "tests", "train.py"]),
             "mypy": subprocess.call([sys.executable, "-m", "mypy", "byol_core", "train.py", "tests/bench"])}
    failed = [name for name, code in codes.items() if code]
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed" + (", slow tests left out" if fast else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
