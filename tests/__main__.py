"""`python -m tests`: the whole check - tests, style, types - in one command. `--fast` leaves the slow tests out."""

import contextlib
import os
import subprocess
import sys
import tempfile

# Parts of the whole check that run beside the rest of the tests, of about the same length each.
BESIDE = [["accuracy", "memory", "best", "bad_files"],
          ["torchrun", "torchrun_faults", "processes", "ema_sharded"],
          ["kills", "signal_delivery", "workers", "soak", "full_disk", "environment", "checkpoint", "crops"],
          ["gpu_command"]]


def main() -> int:
    fast = "--fast" in sys.argv[1:]
    parts = [] if fast else [[f"tests/test_{name}.py" for name in names] for names in BESIDE]
    rest = ["-m", "not slow"] if fast else [f"--ignore={path}" for part in parts for path in part]
    pytest = [sys.executable, "-m", "pytest", "-q"]
    environment = os.environ if fast else {**os.environ, "OMP_NUM_THREADS": "1"}
    codes = {}
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in parts]
        beside = [subprocess.Popen([*pytest, *part], stdout=output, stderr=subprocess.STDOUT, env=environment)
                  for part, output in zip(parts, outputs)]
        codes["pytest"] = subprocess.call([*pytest, *rest], env=environment)
        for names, process, output in zip(BESIDE, beside, outputs):
            codes[f"pytest, {names[0]}"] = process.wait()
            output.seek(0)
            print(output.read())
    codes["flake8"] = subprocess.call([sys.executable, "-m", "flake8", "byol_core", "tests", "train.py"])
    codes["mypy"] = subprocess.call([sys.executable, "-m", "mypy", "byol_core", "train.py", "tests/bench"])
    failed = [name for name, code in codes.items() if code]
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed" + (", slow tests left out" if fast else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
