"""Finds the files of a reward's code: its own, and the user's modules that it imports from the same folder.

Read from the source, so that an import inside a function counts as well. Installed packages and files that
the code opens by itself are not known here.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path


def source_files(file: Path) -> list[Path]:
    """``file``, resolved, and what it imports from its folder or from below it, directly or indirectly."""
    file = file.resolve()
    found, waiting = [file], [file]
    while waiting:
        for imported in _imported_files(waiting.pop(), file.parent):
            if imported not in found:
                found.append(imported)
                waiting.append(imported)
    return [file, *sorted(found[1:])]


def hashes(files: Iterable[Path], folder: Path) -> Mapping[str, str]:
    """SHA-256 of files by their names in ``folder``."""
    digests = {}
    for path in files:
        with path.open("rb") as file:
            name = path.relative_to(folder).as_posix()
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _imported_files(file: Path, folder: Path) -> Iterator[Path]:
    if file.suffix != ".py":
        return
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # it is imported in a case that has not come yet
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files_of(alias.name, folder)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)]
            for name in names:
                if node.level:
                    yield from _files_in(file.parents[node.level - 1], name, folder)
                else:
                    yield from _files_of(name, folder)


def _files_of(name: str, folder: Path) -> Iterator[Path]:
    """The files of module ``name`` and of the packages around it, if they are in ``folder``."""
    top = name.partition(".")[0]
    if not top or top == "quark":
        return
    try:
        # Of a module that is loaded already, the one that was.
        spec = getattr(sys.modules.get(top), "__spec__", None) or importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return
    if spec is not None and spec.has_location and spec.origin is not None:
        origin = Path(spec.origin).resolve()
        parent = origin.parent.parent if spec.submodule_search_locations else origin.parent
        yield from _files_in(parent, name, folder)


def _files_in(parent: Path, name: str, folder: Path) -> Iterator[Path]:
    path = parent
    for part in name.split("."):
        path /= part
        for candidate in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
            if part and candidate.is_relative_to(folder) and candidate.is_file():
                yield (
                    candidate.resolve() if candidate.resolve().is_relative_to(folder) else candidate
                )
