"""The metadata agree with each other."""

import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return  # not a checkout
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert tops <= {"setup.cfg", "byol_core", "tests", "train.py", "README.md", "requirements.txt", "pyproject.toml",
                    "LICENSE", ".gitignore", ".ci"}


PUBLIC = """
from byol_core import BYOL, LARS, Runtime, build_backbone, byol_loss, cosine_tau, ema_update, load_pretrained
from byol_core import open_batches
from byol_core.networks import BYOL, OnlineNetwork, TargetNetwork, mlp_head
from byol_core.training import Progress, Step, train
from byol_core.runtime import Runtime
from byol_core.backbones import build_backbone
from byol_core.evaluate import classifier_accuracy, embed, fit_classifier, knn_accuracy
import byol_core
assert all(getattr(byol_core, name) is not None for name in byol_core.__all__)
assert byol_core.lars.LARS is LARS
from byol_core.report.markup import STYLE
assert "main {" in STYLE.read_text()
print(byol_core.__file__)
"""


def test_public_paths_lead_somewhere() -> None:
    exec(PUBLIC, {})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None,
                    reason="builds a wheel")
def test_what_is_installed_is_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT / "byol_core", source / "byol_core", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    run = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(target)}, "text": True, "check": True}
    shown = subprocess.run([sys.executable, "-c", PUBLIC], capture_output=True, **run)
    assert Path(shown.stdout.strip()).is_relative_to(target)
    for module in ("byol_core", "byol_core.evaluate", "byol_core.embed", "byol_core.export", "byol_core.report"):
        shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, **run)
        assert shown.stdout.startswith("usage: ") and module in shown.stdout.splitlines()[0]
    installed = {path.relative_to(target).as_posix() for path in (target / "byol_core").rglob("*.py")}
    assert installed == {path.relative_to(ROOT).as_posix() for path in (ROOT / "byol_core").rglob("*.py")}
