"""Where the system refuses something, the advice follows from what it refused, and never is to delete what is good."""

from __future__ import annotations

import errno
import inspect
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from quark import errors as all_errors
from quark.cli.exit_codes import ExitCode, way_out_of
from quark.errors import QuarkError
from quark.refusals import way_on
from quark.run_directory import RunDirectory
from quark.training.state.checkpoint import Checkpoints, verify
from tests.cli.commands import TINY_RUN, quark, start
from tests.full_disk import file_size_limit
from tests.training.states import run_state

DELETING = ("--fresh", "--force", "delete", "remove", "from nothing")


def test_no_class_of_errors_comes_with_the_advice_to_delete() -> None:
    kinds = [k for _, k in inspect.getmembers(all_errors, inspect.isclass)]
    for kind in (*kinds, OSError, PermissionError, MemoryError):
        advice = str(way_out_of(kind("x")))
        assert not any(word in advice for word in DELETING), kind
    assert any(issubclass(kind, QuarkError) and way_out_of(kind("x")) for kind in kinds)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "full"), "make room and run the same command"),
        (OSError(errno.EDQUOT, "quota"), "make room and run the same command"),
        (PermissionError(errno.EACCES, "no"), "give this user access to it and run the same command"),
        (OSError(errno.EROFS, "read-only"), "give this user access to it and run the same command"),
        (OSError(errno.EMFILE, "many"), "allow more open files (`ulimit -n`) and run the same command"),
        (OSError(errno.EIO, "broken"), "look after the disk and run the same command"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "make room and run the same command"),
        (ValueError("else"), "run the same command once the cause is gone"),
    ],
)  # fmt: skip
def test_advice_follows_the_cause(error: Exception, advice: str) -> None:
    assert way_on(error) == advice
    if isinstance(error, OSError):
        assert way_out_of(error) == advice


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first round is done."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    outcome = quark("train", "--run-dir", run_dir, *TINY_RUN, "--set", "run.num_rounds=1")
    assert outcome.code == 0, outcome.err
    return run_dir


def resume_until_refused(run_dir: Path) -> str:
    """What the same command says on a disk that refuses; it must be the expected error, and nothing may be lost."""
    checkpoints = sorted(RunDirectory(run_dir).checkpoints.iterdir())
    process = start("train", "--run-dir", run_dir, *TINY_RUN)
    _, err = process.communicate(timeout=600)
    assert process.returncode == ExitCode.STATE, err
    assert "Traceback" not in err
    said = " ".join(err[err.index("error: ") :].split())
    assert "make room and run the same command" in said
    assert not any(word in said for word in DELETING)
    assert all(verify(path) for path in checkpoints)
    return said


@pytest.mark.parametrize("num_bytes", [1_000_000, 30_000, 2_000])
def test_a_file_that_may_not_grow_is_told_as_a_disk_that_is_full(
    begun: Path, tmp_path: Path, num_bytes: int
) -> None:
    run_dir = copied(begun, tmp_path)
    with file_size_limit(num_bytes):  # which the process inherits
        resume_until_refused(run_dir)
    assert quark("train", "--run-dir", run_dir, *TINY_RUN).code == 0


def test_a_disk_that_is_full_is_told_as_such_and_with_room_the_run_goes_on(
    begun: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk):
        run_dir = copied(begun, disk)
        filler = disk / "filler"
        with filler.open("wb") as file:
            file.truncate(0)
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            file.write(b"\0" * max(free - 3_000_000, 0))
        said = resume_until_refused(run_dir)
        assert "cannot save the checkpoint" in said
        last = RunDirectory(run_dir).metrics.read_text().splitlines()[-1]
        assert '"event": "stop"' in last
        assert "CheckpointError: cannot save" in last
        filler.unlink()
        assert quark("train", "--run-dir", run_dir, *TINY_RUN).code == 0


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def copied(run_dir: Path, folder: Path) -> Path:
    target = folder / "copy"
    subprocess.run(["cp", "-r", str(run_dir), str(target)], check=True)
    return target


def test_a_checkpoint_that_cannot_be_opened_now_is_not_called_damaged(begun: Path) -> None:
    folder = RunDirectory(begun).checkpoints
    step = int(max(folder.iterdir()).name.removeprefix("step-"))
    before = sorted(folder.iterdir())
    checkpoints = Checkpoints(folder, keep_last=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        with pytest.raises(OSError, match="Too many open files"):
            verify(before[-1])
        with pytest.raises(OSError, match="Too many open files"):
            checkpoints.save(run_state(step), weights={}, optimizer={})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(folder.iterdir()) == before
    found, rejected = checkpoints.newest()
    assert found is not None
    assert rejected == []
