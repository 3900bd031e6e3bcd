"""`python -m tests`: the whole check - tests, style, types - in one command. `--fast` leaves the slow tests out."""

import os
import subprocess
import sys
import tempfile

WAITING = [f"tests/test_{name}.py" for name in (  # tests that start processes and mostly wait for them: run beside the others
    "torchrun", "processes", "ema_sharded", "kills", "signal_delivery", "workers", "soak", "full_disk")]


def main() -> int:
    fast = "--fast" in sys.argv[1:]
    pytest = [sys.executable, "-m", "pytest", "-q"]
    environment = os.environ if fast else {**os.environ, "OMP_NUM_THREADS": "1"}  # two at once, on a core each
    codes = {}
    with tempfile.TemporaryFile("w+") as output:
        beside = None
        if not fast:
            beside = subprocess.Popen([*pytest, *WAITING], stdout=output, stderr=subprocess.STDOUT, env=environment)
        selection = ["-m", "not slow"] if fast else [f"--ignore={path}" for path in WAITING]
        codes["pytest"] = subprocess.call([*pytest, *selection], env=environment)
        if beside is not None:
            codes["pytest, tests that wait"] = beside.wait()
            output.seek(0)
            print(output.read())
    codes["flake8"] = subprocess.call([sys.executable, "-m", "flake8", "byol_core", "tests", "train.py"])
    codes["mypy"] = subprocess.call([sys.executable, "-m", "mypy", "byol_core", "train.py"])
    failed = [name for name, code in codes.items() if code]
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed" + (", slow tests left out" if fast else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
