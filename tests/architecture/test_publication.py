"""Files take their place in one way: no other module renames, syncs or stages them itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.test_layers import MODULES, PACKAGE

ALLOWED = {
    "publication.py": "it is the one way",
    "api/pushing.py": "it uploads from a temporary folder, which goes with all that is in it",
    "selftest/disk.py": "it tries whether the disk syncs and renames",
    "selftest/damage.py": "it damages a pool's files on purpose",
    "models/check/trials.py": "it tries a saved model in a temporary folder, which goes with all that is in it",
    "selftest/durability.py": "it works in a temporary folder, which goes with all that is in it",
}
"""Modules that may, and why."""
_OF_OS = frozenset({"replace", "rename", "renames", "fsync", "fdatasync", "sync", "link"})
_OF_SHUTIL = frozenset({"move", "copyfile"})
_OF_PATHS = frozenset({"rename", "hardlink_to"})


def offences(source: str) -> Iterator[str]:
    """What a module does itself that is a publication's part."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] == "tempfile")
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            owned = {"os": _OF_OS, "shutil": _OF_SHUTIL}.get(node.module or "", frozenset())
            yield from (["tempfile"] if node.module == "tempfile" else sorted(names & owned))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, name = ast.unparse(node.func.value), node.func.attr
            is_of_module = (owner == "os" and name in _OF_OS) or (
                owner == "shutil" and name in _OF_SHUTIL
            )
            # A text's `replace` takes two arguments.
            is_of_path = name in _OF_PATHS or (
                name == "replace"
                and owner != "dataclasses"
                and len(node.args) == 1
                and not node.keywords
            )
            if is_of_module or is_of_path:
                yield f"{ast.unparse(node.func)} in line {node.lineno}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_the_publication_publishes(module: Path) -> None:
    found = list(offences((PACKAGE / module).read_text(encoding="utf-8")))
    if module.as_posix() in ALLOWED:
        assert found, f"{module} needs no exception any more"
        return
    assert not found, (
        f"quark/{module} publishes files itself ({', '.join(found)}): use quark.publication, or say in ALLOWED why not"
    )


@pytest.mark.parametrize(
    "code",
    [
        "os.replace(a, b)",
        "staged.replace(path)",
        "path.with_name('x').rename(path)",
        "os.fsync(file.fileno())",
        "import tempfile",
        "from tempfile import mkstemp",
        "from os import replace",
        "shutil.move(a, b)",
    ],
)
def test_a_module_that_did_would_be_found(code: str) -> None:
    assert list(offences(code))


@pytest.mark.parametrize(
    "code", ["text.replace('a', 'b')", "replace(point, x=1)", "dataclasses.replace(point)"]
)
def test_what_only_sounds_alike_is_let_through(code: str) -> None:
    assert not list(offences(code))
