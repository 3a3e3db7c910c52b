"""Finds the files of a reward's code: its own, and the user's modules that it imports from the same folder.

Read from the source, so that an import inside a function counts as well. Installed packages, files that the code
opens by itself and modules whose names it computes are not known here.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

MAX_SOURCE_BYTES = 1 << 20
"""Of a file whose imports are looked for: the syntax tree takes up to a thousand times as much memory."""
_INSTALLED = frozenset(
    Path(sysconfig.get_path(name)).resolve()
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
"""Folders where every module is a neighbor of every other one."""


def source_files(file: Path) -> list[Path]:
    """``file``, resolved, and what it imports from its folder or from below it, directly or indirectly."""
    file = file.resolve()
    return [file, *_imported_from([file], file.parent)]


def package_files(file: Path) -> list[Path]:
    """``file``, resolved, and the files of its own package that are loaded with it, or beside it as in ``source_files``."""
    file = file.resolve()
    folder = file.parent
    around = []
    while (init := folder / "__init__.py").is_file():
        around.append(init)
        folder = folder.parent
    if not around:
        return source_files(file)
    begin = [file, *(init for init in around if init != file)]
    return [file, *sorted({*begin[1:], *_imported_from(begin, around[-1].parent)})]


def _imported_from(files: Iterable[Path], folder: Path) -> list[Path]:
    """What ``files`` import from ``folder`` or from below it, sorted and without ``files``."""
    if folder in _INSTALLED:
        return []
    begin = list(files)
    found, waiting = set(begin), begin.copy()
    while waiting:
        for imported in _imported_files(waiting.pop(), folder):
            if imported not in found:
                found.add(imported)
                waiting.append(imported)
    return sorted(found.difference(begin))


def hashes(files: Iterable[Path], folder: Path) -> Mapping[str, str]:
    """SHA-256 of files by their names in ``folder``."""
    digests = {}
    for path in files:
        with path.open("rb") as file:
            name = path.relative_to(folder).as_posix()
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _imported_files(file: Path, folder: Path) -> Iterator[Path]:
    if file.suffix != ".py" or file.stat().st_size > MAX_SOURCE_BYTES:
        return
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
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
