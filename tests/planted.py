"""What a stranger may plant in the place of a file, and what a test sees of its being touched."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

Plant = Callable[[Path], None]
SECRET = Path("/etc/passwd")
"""A file that every machine has, with a text that no run has."""


def _make_way(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)


def link_to_a_secret(path: Path) -> None:
    _make_way(path)
    path.symlink_to(SECRET)


def endless_device(path: Path) -> None:
    _make_way(path)
    path.symlink_to("/dev/zero")


def named_pipe(path: Path) -> None:
    _make_way(path)
    os.mkfifo(path)


PLANTS = [
    pytest.param(plant, id=plant.__name__)
    for plant in (link_to_a_secret, endless_device, named_pipe)
]


@dataclass
class Reached:
    """What happened while ``recorded`` watched."""

    network: list[str] = field(default_factory=list)
    """Addresses that were asked for."""
    files: list[Path] = field(default_factory=list)
    """Files that Python opened, with links followed."""
    processes: list[str] = field(default_factory=list)
    variables: list[str] = field(default_factory=list)
    """Environment variables that were read by name."""


_watching: list[Reached] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _watching:
        return
    reached = _watching[-1]
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        reached.network.append(
            f"{event} {arguments[-1] if event == 'socket.connect' else arguments[0]}"
        )
    elif event == "open" and isinstance(arguments[0], str | bytes):
        reached.files.append(Path(os.path.realpath(os.fsdecode(arguments[0]))))
    elif event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
        reached.processes.append(f"{event} {arguments[0]!r}")


_installed: list[bool] = []


@contextlib.contextmanager
def recorded() -> Iterator[Reached]:
    """Within: every connection, opened file, started process and variable that is read is recorded."""
    if not _installed:  # a hook stays for the life of the process
        sys.addaudithook(_hook)
        _installed.append(True)
    reached = Reached()
    environment = type(os.environ)
    read = environment.__getitem__

    def reading(self: os._Environ[str], key: str) -> str:
        reached.variables.append(key)
        return read(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "__getitem__", reading)
        _watching.append(reached)
        try:
            yield reached
        finally:
            _watching.pop()
