"""What benchmarks and scripts import of quark is there. Many imports lie in functions, which no test calls."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("benches", "scripts") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_name_that_is_imported_from_quark_is_there(file: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "quark":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_package = hasattr(module, "__path__")
                is_module = is_package and importlib.util.find_spec(name) is not None
                if not hasattr(module, alias.name) and not is_module:
                    missing.append(name)
    assert missing == []
