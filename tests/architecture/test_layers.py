"""The house is in order: arrows run down, families do not know each other, every room says what it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import quark

PACKAGE = Path(quark.__file__).parent
ROOT = PACKAGE.parent

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "__init__"}),
    frozenset(
        {
            "types",
            "settings",
            "run_directory",
            "run_identity",
            "publication",
            "formats",
            "safe_files",
            "http_client",
            "http_deadline",
            "installing",
            "text_statistics",
            "bounded_files",
            "arrow_sizes",
            "csv_files",
            "parquet_sizes",
            "printable",
            "refusals",
            "assets",
            "_pool_rs",
        }
    ),
    frozenset({"models"}),
    frozenset({"objectives", "reference", "generation", "rewards", "pool", "data"}),
    frozenset({"evaluation", "selftest", "interchange", "integrations"}),
    frozenset({"config"}),
    frozenset({"training", "report"}),
    frozenset({"api", "view"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
"""Rooms from the ground up. A room imports rooms of lower layers and itself, never a sibling."""

HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
GROUND = HEIGHT["types"]
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imports_of(module: Path) -> Iterator[tuple[str, int]]:
    """(room, line) of everything of quark that a module imports, wherever in it."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "quark":
                room = rest.partition(".")[0]
                yield (room if room in HEIGHT else "__init__"), node.lineno


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_room_imports_only_rooms_below_it(module: Path) -> None:
    room = room_of(module)
    assert room in HEIGHT, f"{module} is in no layer: say in which one"
    for other, line in imports_of(module):
        is_own = other == room
        is_below = HEIGHT[other] < HEIGHT[room]
        is_ground = HEIGHT[room] == HEIGHT[other] == GROUND
        assert is_own or is_below or is_ground, f"quark/{module}:{line} imports quark.{other}"


TRAINING: tuple[frozenset[str], ...] = (
    frozenset({"seeds", "events", "position"}),
    frozenset({"processes"}),
    frozenset({"state"}),
    frozenset({"loop"}),
)
"""The rooms of ``training/`` from the ground up. Its other modules assemble a run from all of them."""


def training_height(name: str) -> int:
    return next((height for height, rooms in enumerate(TRAINING) if name in rooms), len(TRAINING))


def modules_imported_by(module: Path) -> Iterator[str]:
    """Dotted names of quark's modules that a module imports, inside functions and for types too."""
    names = {
        ".".join(("quark", *path.with_suffix("").parts)).removesuffix(".__init__")
        for path in MODULES
    }
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [node.module or ""] if not all(name in names for name in found) else []
        else:
            continue
        yield from (name for name in found if name in names)


@pytest.mark.parametrize(
    "module", [module for module in MODULES if module.parts[0] == "training"], ids=str
)
def test_a_room_of_training_imports_only_rooms_below_it(module: Path) -> None:
    own = module.parts[1].removesuffix(".py")
    for name in modules_imported_by(module):
        if name.startswith("quark.training."):
            other = name.split(".")[2]
            is_below = training_height(other) < training_height(own)
            is_assembly = training_height(own) == len(TRAINING)
            assert other == own or is_below or is_assembly, f"quark/{module} imports {name}"


def test_nothing_changes_the_position_of_a_run_through_the_journal() -> None:
    """The trainer moves the position or passes it on. The journal is for saying where something happened."""
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
            targets: list[ast.expr] = []
            if isinstance(node, ast.Assign):
                # An alias of it could be changed anywhere.
                is_alias = ast.unparse(node.value).endswith("journal.position")
                assert not is_alias, f"quark/{module}:{node.lineno}"
                targets = node.targets
            elif isinstance(node, ast.AugAssign):
                targets = [node.target]
            for target in targets:
                assert "journal.position." not in ast.unparse(target), (
                    f"quark/{module}:{node.lineno}"
                )


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        ".".join(("quark", *module.with_suffix("").parts)).removesuffix(".__init__"): set(
            modules_imported_by(module)
        )
        for module in MODULES
    }
    graph = {name: others - {name} for name, others in graph.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert set(order) >= set(graph)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_says_what_lives_in_it(module: Path) -> None:
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"quark/{module} has no docstring"


MOST_LINES = 80
"""Of a function's body, from the first statement after its docstring."""


def test_every_function_can_be_read_at_a_glance() -> None:
    """Signatures do not count: a command's has a line or more for each option."""
    longer = []
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                if body and (node.end_lineno or 0) - body[0].lineno + 1 > MOST_LINES:
                    longer.append(f"{module.as_posix()}: {node.name}")
    assert not longer


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_nothing_can_unpickle_or_run_a_string(module: Path) -> None:
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    forbidden = {"pickle", "joblib", "marshal", "shelve", "dill"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not forbidden & {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in forbidden
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"quark/{module}:{node.lineno}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            is_torch_load = (
                node.func.attr == "load" and isinstance(owner, ast.Name) and owner.id == "torch"
            )
            assert not is_torch_load, f"quark/{module}:{node.lineno}"


def in_new_process(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=60,
    ).stdout


def test_help_imports_nothing_heavy() -> None:
    loaded = (
        in_new_process(
            "import sys\n"
            "from quark.cli.app import run\n"
            "assert run(['--help']) == 0\n"
            "print('\\n' + ' '.join(sys.modules))"
        )
        .splitlines()[-1]
        .split()
    )
    heavy = {
        "torch",
        "transformers",
        "numpy",
        "polars",
        "matplotlib",
        "jinja2",
        "safetensors",
        "httpx2",
    }
    assert not heavy & set(loaded)
    ours = [
        name for name in loaded if name.startswith("quark.") and not name.startswith("quark.cli")
    ]
    constants = {"quark.pool", "quark.pool.columns", "quark.pool.defaults"}
    constants |= {"quark.api", "quark.api.process"}
    assert set(ours) <= {"quark.errors", "quark.printable", "quark.refusals"} | constants


@pytest.mark.parametrize(
    "command",
    [
        ["config", "show", "demo"],
        ["init", "run.toml"],
        ["report", "absent"],
        ["pool", "stats", "absent"],
        ["pool", "query", "absent", "select 1"],
        ["pool", "import", "absent", "rows.jsonl"],
        ["pool", "rescore", "absent", "--reward", "vader"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_command_without_a_model_imports_no_torch(command: list[str], tmp_path: Path) -> None:
    loaded = in_new_process(
        "import os, sys\n"
        "from quark.cli.app import run\n"
        f"os.chdir({str(tmp_path)!r})\n"
        f"run({command!r})\n"
        "print('\\n' + ' '.join(sys.modules))"
    ).splitlines()[-1]
    assert "quark.cli.app" in loaded.split()
    assert not {"torch", "transformers"} & set(loaded.split())


def test_importing_quark_loads_nothing_else_of_it() -> None:
    loaded = in_new_process(
        "import quark, sys; print(*(m for m in sys.modules if m.startswith('quark')))"
    )
    assert loaded.split() == ["quark"]


def test_the_package_runs_as_a_module() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "quark", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=60,
    ).stdout
    assert out.strip() == f"quark {quark.__version__}"
