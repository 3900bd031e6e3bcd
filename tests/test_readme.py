"""The README's commands parse, its Python runs, and its names exist."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from byol_core import embed, export
from byol_core.evaluate import __main__ as evaluate_command
from byol_core.images.digits import write_digits
from byol_core.report import __main__ as report_command
from byol_core.run.options import build_parser
from tests.helpers.forking import run_code
from tests.helpers.runs import FILES

PARSERS = {"train.py": build_parser(), "byol_core.evaluate": evaluate_command.build_parser(),
           "byol_core.embed": embed.build_parser(), "byol_core.export": export.build_parser(),
           "byol_core.report": report_command.build_parser()}
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SHELL_BLOCKS = re.findall(r"```\n(.*?)```", re.sub(r"```[a-z]+\n.*?```", "", README, flags=re.DOTALL), flags=re.DOTALL)


def test_quick_start_is_two_commands_that_set_themselves_up() -> None:
    section = README.split("## Quick start")[1].split("\n## ")[0]
    commands = [line for line in section.splitlines() if line.startswith("python3 -m venv .venv && ")]
    assert len(commands) == 2
    assert "train.py" in commands[0] and commands[1].endswith("-m tests")


def test_every_command_parses() -> None:
    lines = [line for block in SHELL_BLOCKS for line in block.splitlines()]
    commands = [(name, line.split(f"{name} ", 1)[1]) for line in lines for name in PARSERS if f"{name} " in line]
    assert len(commands) >= 2
    for name, arguments in commands:
        PARSERS[name].parse_args(shlex.split(arguments, comments=True))


def test_every_flag_that_is_mentioned_exists() -> None:
    flags = {flag for parser in PARSERS.values() for action in parser._actions for flag in action.option_strings}
    mentioned = set(re.findall(r"`(--[a-z-]+)", README)) | set(re.findall(r" (--[a-z]+-[a-z]+) ", README))
    assert mentioned - flags <= {"--fast"}


def test_every_file_of_a_run_is_explained() -> None:
    section = README.split("## What the run folder holds")[1].split("\n## ")[0]
    explained = set(re.findall(r"`([a-z_]+\.[a-z]+)`", section.split("Exit codes")[0]))
    assert FILES | {"bad_files.txt", "best.pt", "best.json"} == explained


def test_the_lines_of_the_loop_are_those_of_the_code() -> None:
    section = README.split("## The loop")[1].split("\n## ")[0]
    code = (ROOT / "byol_core" / "training.py").read_text()
    lines = [line.split("  #")[0].strip() for line in re.search(r"```python\n(.*?)```", section, re.DOTALL)[1].splitlines()]
    assert len(lines) > 5 and all(line in code for line in lines)


# All but the excerpt of the loop and what needs a finished run.
RUNNABLE = [block for block in PYTHON_BLOCKS
            if "import " in block and '"runs/' not in block and '"embeddings.npz"' not in block]


@pytest.mark.slow
@pytest.mark.parametrize("block", RUNNABLE, ids=range(len(RUNNABLE)))
def test_python_runs_as_printed(block: str, tmp_path: Path) -> None:
    if '"./imgs"' in block:
        write_digits(tmp_path / "imgs")
        for number, path in enumerate(sorted((tmp_path / "imgs").rglob("*.png"))):
            if number % 8:  # an eighth of them will do
                path.unlink()
        for number in range(2):  # with images of different sizes, which workers read
            Image.new("RGB", (9 + number, 9)).save(tmp_path / "imgs" / f"{number}.png")
    assert "Traceback" not in run_code(block, tmp_path)


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -m1 -- '(.*?)' README.md", script)
    assert pattern is not None
    found = [line for line in README.splitlines() if re.search(pattern[1], line)]
    assert found and found[0].startswith("python3 -m venv .venv && ")


def test_nothing_in_the_readme_is_left_open() -> None:
    assert not re.search(r"@[A-Z]+@|TODO|FIXME", README)
