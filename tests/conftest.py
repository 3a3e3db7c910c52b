"""For all tests."""

import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is the machine's affair: a busy one must fail no test.
settings.register_profile("quark", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("quark")


class InternalErrors:
    """Ends a session with a status other than 0 where pytest itself failed.

    After an internal error of a worker, pytest-xdist leaves the worker's tests out and ends with status 0.
    """

    def __init__(self) -> None:
        self.happened = False

    def pytest_internalerror(self) -> None:
        self.happened = True

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.happened:
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(InternalErrors())


def pytest_report_header() -> str:
    folder = tempfile.gettempdir()
    return (
        f"free space in {folder}: {shutil.disk_usage(folder).free / 1e9:.1f} GB (3 GB are needed)"
    )


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Let a worker send any text: a lone surrogate in the report of a failed test would end the worker."""
    return _encodable((yield))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_encodable, value))
    return value


LONGEST = ("integration", "training", "cli", "goals", "selftest", "pool")
"""Folders whose files take the longest, in the order in which they start."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start long files first, so that no process has a long one left when the others are done."""

    def rank(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)

    items.sort(key=rank)


@pytest.fixture(scope="session", autouse=True)
def _state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tests' own place for grants, in child processes too."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder
