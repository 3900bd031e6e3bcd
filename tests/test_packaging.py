"""The metadata agree with each other."""

import configparser
import re
from pathlib import Path

import byol_core

ROOT = Path(__file__).parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_the_four_packages_are_required_and_nothing_else() -> None:
    required = lines(SETUP["options"]["install_requires"])
    assert [re.split(r"[<>=!~]", line)[0] for line in required] == ["torch", "torchvision", "scikit-learn", "tqdm"]
    assert required == lines((ROOT / "requirements.txt").read_text())


def test_version_is_stated_once_in_effect() -> None:
    assert SETUP["metadata"]["version"] == byol_core.__version__


def test_top_level_holds_what_was_agreed() -> None:
    import subprocess
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return  # not a checkout
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert tops <= {"setup.cfg", "byol_core", "tests", "train.py", "README.md", "requirements.txt", "pyproject.toml",
                    "LICENSE", ".gitignore", ".ci"}
