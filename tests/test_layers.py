"""Who may import whom, what importing costs, and habits that the whole package keeps."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import byol_core

PACKAGE = Path(__file__).parent.parent / "byol_core"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
# From the ground up: a folder, or a name for some of the files on top, and what of the package it may use beside itself.
METHOD = {"ema", "schedules", "losses", "lars", "networks", "training", "runtime", "backbones", "cuda_graph",
          "small_maps"}
COMMANDS = {"embed", "export"}
MAY_USE = {
    "version": set(),
    "system": {"version"},
    "method": {"system"},
    "images": {"system"},
    "views": {"images", "system"},
    "pretrained": {"views", "method", "system"},
    "evaluate": {"pretrained", "views", "images", "method", "system"},
    "report": {"evaluate", "views", "images", "system"},
    "commands": {"evaluate", "pretrained", "views", "images", "method", "system"},
    "run": {"report", "evaluate", "views", "images", "method", "system", "version"},
    "__main__": {"run", "system"},
}
STANDARD_LIBRARY_ONLY = {"version.py", "schedules.py", "system/command.py", "system/console.py", "system/seeds.py",
                         "system/signals.py"}
TORCH_ONLY = {"ema.py", "losses.py", "lars.py", "networks.py", "small_maps.py", "views/image_ops.py"}


def place(module: str) -> str:
    """Where in the table "system.files", "ema" and the like stand."""
    first = module.split(".")[0]
    return "method" if first in METHOD else "commands" if first in COMMANDS else first


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function; also the names, which may be modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
            assert "byol_core" not in names, f"{path}: import byol_core, which does not say what is used"
            found |= names
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            assert path.name == "__init__.py" or "byol_core." not in ast.unparse(node.args[0]) or isinstance(
                node.args[0], ast.Constant), f"{path}: {ast.unparse(node)}, of which this test cannot read the name"
            found |= {word.value for word in node.args if isinstance(word, ast.Constant)}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_go_one_way() -> None:
    for file in FILES:
        at = place(file.removesuffix(".py").replace("/", "."))
        used = {name.removeprefix("byol_core.") for name in imports(PACKAGE / file) if name.startswith("byol_core.")}
        places = {place(byol_core._HOME.get(name, name)) for name in used}  # of public names where they live
        assert places - {at} <= MAY_USE[at], file


def test_the_table_goes_from_the_ground_up_and_has_no_stale_row() -> None:
    below: set[str] = set()
    for name, used in MAY_USE.items():
        assert used <= below, name
        below.add(name)
    assert {place(file.removesuffix(".py").replace("/", ".")) for file in FILES} == below
    assert {f"{name}.py" for name in METHOD | COMMANDS} | {"version.py", "pretrained.py", "__main__.py"} == {
        file for file in FILES if "/" not in file}


def test_no_file_uses_one_that_uses_it() -> None:
    modules = {file.removesuffix(".py").replace("/", "."): file for file in FILES}
    uses = {file: {modules[name] for used in imports(PACKAGE / file) if (name := used.removeprefix("byol_core.")) in modules}
            for file in FILES}
    settled: set[str] = set()
    while settled != set(FILES):
        ready = {file for file, used in uses.items() if used <= settled} - settled
        assert ready, f"a circle among {set(FILES) - settled}"
        settled |= ready


def test_some_files_need_nothing_else_installed() -> None:
    for file in STANDARD_LIBRARY_ONLY | TORCH_ONLY:
        foreign = {name.split(".")[0] for name in imports(PACKAGE / file)} - set(sys.stdlib_module_names) - {"byol_core"}
        assert foreign <= ({"torch"} if file in TORCH_ONLY else set()), file


def loaded_after(statement: str) -> set[str]:
    script = f"{statement}\nimport sys\nprint(*{{'torch', 'torchvision', 'sklearn', 'PIL'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_neither_torch_nor_torchvision_nor_sklearn() -> None:
    assert loaded_after("from byol_core import ema_update, byol_loss, LARS, BYOL") == {"torch"}
    assert loaded_after("from byol_core import cosine_tau") == set()


def test_help_of_a_command_does_not_load_torch() -> None:
    assert loaded_after("import contextlib, train\nfrom byol_core import embed, export\n"
                        "from byol_core.evaluate import __main__\n"
                        "from byol_core.report import __main__ as report\n"
                        "for command in train, embed, export, __main__, report:\n"
                        "    with contextlib.suppress(SystemExit):\n        command.main(['--help'])") == set()


def test_a_name_that_the_package_does_not_have_is_named() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        byol_core.nonsense


def test_no_file_has_print_exit_or_mutable_defaults() -> None:
    for file, node in [(file, node) for file in FILES for node in ast.walk(ast.parse((PACKAGE / file).read_text()))]:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "exit", "quit"), f"{file}, line {node.lineno}"
        if isinstance(node, ast.FunctionDef):
            assert not any(isinstance(default, (ast.List, ast.Dict, ast.Set)) for default in node.args.defaults), node.name


def test_the_loop_fits_on_a_screen() -> None:
    tree = ast.parse((PACKAGE / "training.py").read_text())
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    first_statement = train.body[1]  # after the docstring
    assert train.end_lineno - first_statement.lineno < 50
