"""`python -m tests`: the whole check - tests, style, types - in one command. `--fast` leaves the slow tests out."""

import os
import subprocess
import sys
import tempfile

TORCHRUN = ["tests/test_torchrun.py", "tests/test_processes.py", "tests/test_ema_sharded.py"]  # they mostly wait


def main() -> int:
    fast = "--fast" in sys.argv[1:]
    pytest = [sys.executable, "-m", "pytest", "-q"]
    codes = {}
    with tempfile.TemporaryFile("w+") as output:
        beside = None
        if not fast:
            beside = subprocess.Popen([*pytest, *TORCHRUN], stdout=output, stderr=subprocess.STDOUT,
                                      env={**os.environ, "OMP_NUM_THREADS": "1"})
        selection = ["-m", "not slow"] if fast else [f"--ignore={path}" for path in TORCHRUN]
        codes["pytest"] = subprocess.call([*pytest, *selection])
        if beside is not None:
            codes["pytest, several processes"] = beside.wait()
            output.seek(0)
            print(output.read())
    codes["flake8"] = subprocess.call([sys.executable, "-m", "flake8", "byol_core", "tests", "train.py"])
    codes["mypy"] = subprocess.call([sys.executable, "-m", "mypy", "byol_core", "train.py"])
    failed = [name for name, code in codes.items() if code]
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed" + (", slow tests left out" if fast else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
