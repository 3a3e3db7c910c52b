"""Grants of the user to a run's configuration, and the error if it reaches anything else.

A grant is for one thing, named by one setting, in one run directory; of code, for the content of its file and of the
files beside it that it imports, too. Grants are kept in the user's state folder, one small JSON file each, where nothing
that comes with a run can write them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
from collections.abc import Collection, Iterable
from pathlib import Path

from quark.bounded_files import parse_json
from quark.config.reach import Kind, Reach
from quark.errors import ConfigError, UnsafeFileError
from quark.publication import publish_file
from quark.safe_files import read_bytes
from quark.types import Json

_FORMAT = 1
_MAX_RECORD_BYTES = 1 << 20


class Grants:
    """The remembered grants of one run directory.

    Args:
        run: the run directory; by its real path, so a run that was moved asks again.
    """

    def __init__(self, run: Path) -> None:
        self._run = os.path.realpath(run)
        self._folder = _state_folder()

    def has(self, reach: Reach) -> bool:
        """Whether exactly this was allowed."""
        if self._folder is None:
            return False
        record = self._record(reach)
        try:
            return read_bytes(self._path(record), self._folder) == record
        except (OSError, UnsafeFileError):
            return False

    def remember(self, reaches: Iterable[Reach]) -> None:
        """Allow ``reaches`` from now on. If the state folder is not writable, nothing is remembered."""
        if self._folder is None:
            return
        for reach in reaches:
            record = self._record(reach)
            path = self._path(record)
            with contextlib.suppress(OSError):
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                publish_file(path, record, mode=0o600)

    def changed(self, reach: Reach) -> list[str]:
        """The files of code that differ from what was allowed last; empty where nothing like it was."""
        now = self._content(reach)
        before: tuple[float, dict[str, Json]] | None = None
        for path in () if self._folder is None else self._folder.glob("*.json"):
            try:
                record = parse_json(read_bytes(path, path.parent, limit=_MAX_RECORD_BYTES))
                modified = path.stat().st_mtime
            except (OSError, ValueError, UnsafeFileError):
                continue
            is_like = isinstance(record, dict) and all(
                record.get(name) == now[name] for name in ("run", "key", "kind", "thing")
            )
            if is_like and (before is None or modified > before[0]):
                before = modified, record
        if before is None:
            return []
        then = before[1]
        files = dict(reach.imports)
        old = then.get("imports", {})
        old = old if isinstance(old, dict) else {}
        own = [] if then.get("sha256") == reach.sha256 else [reach.thing.rpartition(":")[0]]
        others = [name for name in {**old, **files} if old.get(name) != files.get(name)]
        return own + others

    def _content(self, reach: Reach) -> dict[str, Json]:
        record: dict[str, Json] = {
            "format_version": _FORMAT,
            "run": self._run,
            "key": reach.key,
            "kind": reach.kind.value,
            "thing": reach.thing,
            "sha256": reach.sha256,
        }
        return record | ({"imports": dict(reach.imports)} if reach.imports else {})

    def _record(self, reach: Reach) -> bytes:
        record = self._content(reach)
        return json.dumps(record, indent=1).encode() + b"\n"

    def _path(self, record: bytes) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(record).hexdigest()}.json"


def require(
    reaches: Iterable[Reach],
    run: Path,
    *,
    named: Collection[tuple[str, str]] = (),
    allowed: Collection[str] = (),
) -> None:
    """Check that the user has allowed what a run's own configuration reaches.

    Things named in ``allowed`` are remembered.

    Args:
        reaches: what a command is about to use.
        run: the run directory whose configuration names it.
        named: what options of this command say of their own: the setting, and the value that they give it.
        allowed: the things that ``--allow`` names.

    Raises:
        ConfigError: something was never allowed; names each with its setting, and the options that allow it.
    """
    grants = Grants(run)
    asked = [reach for reach in reaches if (reach.key, reach.said) not in named]
    grants.remember(reach for reach in asked if reach.thing in allowed)
    asked = [reach for reach in asked if reach.thing not in allowed and not grants.has(reach)]
    if not asked:
        return
    things = dict.fromkeys(reach.thing for reach in asked)
    options = shlex.join(word for thing in things for word in ("--allow", thing))
    raise ConfigError(
        f"the configuration in {run} reaches beyond the run, and you have not allowed it yet:\n"
        + "".join(f"  {_line(reach, grants.changed(reach))}\n" for reach in asked)
        + f"If you trust where it comes from, add: {options}"
    )


def _line(reach: Reach, changed: list[str]) -> str:
    line = f"{reach.key}: {reach.kind.value} {reach.thing}"
    if reach.kind is Kind.CODE and reach.sha256 is not None:
        line += f" (sha256 {reach.sha256[:16]})"
        if reach.imports:
            line += ", which imports " + ", ".join(name for name, _ in reach.imports)
        if changed:
            line += ". Changed since you allowed it: " + ", ".join(changed)
    return line


def _state_folder() -> Path | None:
    """Where grants are kept; None without a home."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if Path(
        base
    ).is_absolute():  # others are to be ignored, says the XDG base directory specification
        return Path(base) / "quark" / "grants"
    try:
        return Path.home() / ".local" / "state" / "quark" / "grants"
    except RuntimeError:
        return None
