"""Who may import whom, what importing costs, and habits that the whole package keeps."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "byol_core"
GROUND = {"cuda_graph", "ema", "schedules", "losses", "lars", "image_ops", "seeds", "small_maps"}
# Each module and what it may import from the package; layer by layer, from the ground up.
MAY_IMPORT: dict[str, set[str]] = {
    **{name: set() for name in GROUND},
    "backbones": {"failures", "seeds"}, "views": {"image_ops"}, "watch": {"failures"},
    "memory": set(), "checkpoint": set(), "config": set(),
    "listing": {"failures"}, "shards": {"checkpoint", "listing"}, "decoding": {"shards"},
    "folder": {"checkpoint", "decoding", "listing", "shards"},
    "copies": {"checkpoint", "folder", "listing"},
    "processes": {"signals", "watch"}, "runtime": {"cuda_graph", "lars", "processes", "small_maps", "watch"},
    "sample": {"config"},
    "run_folder": {"checkpoint", "config", "run_facts"}, "failures": set(), "workers": {"signals"},
    "networks": {"ema"},
    "device_views": {"image_ops", "views", "seeds"},
    "health": {"losses"}, "charts": set(),
    "run_facts": {"health"},
    "report_style": set(), "report": {"charts", "checkpoint", "config", "failures", "report_style", "run_facts", "sample"},
    "plan": {"config", "schedules", "views"},
    "optim": {"lars", "networks", "plan", "schedules"},
    "data": {"decoding", "folder", "plan", "runtime", "views", "workers"},
    "batches": {"data", "decoding", "device_views", "seeds", "views", "workers"},
    "crops": {"batches", "data", "decoding", "device_views", "views"},
    "buffers": {"runtime"},
    "training": {"buffers", "cuda_graph", "ema", "losses", "networks", "optim", "runtime", "schedules", "seeds"},
    "tensorboard": set(),
    "metrics": {"checkpoint", "failures", "health", "processes", "schedules", "tensorboard", "training"},
    "evaluate": {"data", "folder", "runtime", "views"},
    "linear_probe": set(),
    "pretrained": {"backbones", "checkpoint", "views"},
    "command": {"config", "failures"},
    "evaluate_command": {"checkpoint", "command", "config", "copies", "data", "evaluate", "folder", "linear_probe", "losses",
                         "pretrained", "runtime", "views"},
    "embed": {"checkpoint", "command", "config", "data", "evaluate", "folder", "pretrained", "runtime"},
    "export": {"checkpoint", "command", "config", "pretrained"},
    "pictures": {"batches", "checkpoint", "data", "decoding", "seeds", "views"},
    "scoring": {"config", "data", "evaluate", "linear_probe", "runtime", "views"},
    "separation": {"batches", "evaluate", "runtime", "scoring", "seeds"},
    "signals": set(),
    "parts": {"backbones", "batches", "checkpoint", "config", "crops", "data", "evaluate", "folder", "memory", "metrics",
              "networks", "optim", "plan", "processes", "runtime", "scoring", "separation", "tensorboard", "training"},
    "outcome": {"checkpoint", "evaluate", "failures", "health", "losses", "memory", "parts", "pictures", "report", "run_facts",
                "sample", "scoring"},
    "snapshot": {"checkpoint", "config", "data", "outcome", "parts", "plan", "training", "views"},
    "run": {"checkpoint", "config", "copies", "cuda_graph", "data", "folder", "memory", "outcome", "parts", "plan",
            "processes", "run_folder", "runtime", "signals", "snapshot", "tensorboard", "training", "workers"},
}
STANDARD_LIBRARY_ONLY = {"schedules", "seeds", "config", "command", "failures", "signals"}
TORCH_ONLY = {"ema", "losses", "lars", "image_ops", "networks", "small_maps"}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function; what it does as a command is not counted."""
    found = set()
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" if node.module == "byol_core" else node.module for alias in node.names}
    return found


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_layer_allows(module: str) -> None:
    own = {name.split(".")[1] for name in imports(PACKAGE / f"{module}.py") if name.startswith("byol_core.")}
    own.discard("__version__")
    assert module in MAY_IMPORT, f"{module} has no place in the table"
    assert own <= MAY_IMPORT[module]


def test_the_table_has_no_cycle_and_no_stale_row() -> None:
    assert sorted(MAY_IMPORT) == MODULES
    settled: set[str] = set()
    while settled != set(MAY_IMPORT):
        ready = {name for name, needed in MAY_IMPORT.items() if needed <= settled} - settled
        assert ready, f"a cycle among {set(MAY_IMPORT) - settled}"
        settled |= ready


@pytest.mark.parametrize("module", sorted(STANDARD_LIBRARY_ONLY | TORCH_ONLY))
def test_ground_modules_need_nothing_else_installed(module: str) -> None:
    foreign = {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py")} - set(sys.stdlib_module_names) - {"byol_core"}
    assert foreign <= ({"torch"} if module in TORCH_ONLY else set())


def loaded_after(statement: str) -> set[str]:
    script = f"{statement}\nimport sys\nprint(*{{'torch', 'torchvision', 'sklearn', 'PIL'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(done.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_torchvision_nor_sklearn() -> None:
    assert loaded_after("import byol_core") == set()
    assert loaded_after("from byol_core import ema_update, byol_loss, LARS, BYOL") == {"torch"}
    assert loaded_after("from byol_core import cosine_tau") == set()


def test_public_names_are_where_the_readme_says() -> None:
    import byol_core
    for name in byol_core.__all__:
        assert getattr(byol_core, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        byol_core.nonsense


@pytest.mark.parametrize("module", MODULES)
def test_module_has_no_print_exit_or_mutable_default(module: str) -> None:
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "exit", "quit"), f"line {node.lineno}"
        if isinstance(node, ast.FunctionDef):
            assert not any(isinstance(default, (ast.List, ast.Dict, ast.Set)) for default in node.args.defaults), node.name


def test_the_loop_fits_on_a_screen() -> None:
    tree = ast.parse((PACKAGE / "training.py").read_text())
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    first_statement = train.body[1]  # after the docstring
    assert train.end_lineno - first_statement.lineno < 50
