"""`python -m tests`: the whole check - tests, style, types - in one command. `--fast` leaves the slow tests out."""

import subprocess
import sys


def main() -> int:
    fast = "--fast" in sys.argv[1:]
    selection = ["-m", "not slow"] if fast else []
    commands = {
        "pytest": [sys.executable, "-m", "pytest", "-q", *selection],
        "flake8": [sys.executable, "-m", "flake8", "byol_core", "tests", "train.py"],
        "mypy": [sys.executable, "-m", "mypy", "byol_core", "train.py"],
    }
    codes = {name: subprocess.call(command) for name, command in commands.items()}
    failed = [name for name, code in codes.items() if code]
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed" + (", slow tests left out" if fast else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
