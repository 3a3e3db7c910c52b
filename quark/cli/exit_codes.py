"""What the process's exit status says, and which error leads to which.

The numbers are part of the command line's contract (docs/cli.md): they are never reused.
"""

from __future__ import annotations

import errno
from enum import IntEnum

from quark.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    PoolCorruptedError,
    PoolError,
    PoolLockedError,
    PoolPoisonedError,
    PoolSnapshotError,
    PoolVersionError,
    QuarkError,
    RewardError,
    RunDirectoryError,
    TrainingError,
    UnsafeFileError,
)


class ExitCode(IntEnum):
    """Exit status of every command."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    INPUT = 3
    STATE = 4
    INTERRUPTED = 75
    KILLED = 130


MEANINGS: dict[ExitCode, str] = {
    ExitCode.OK: "done",
    ExitCode.UNEXPECTED: "unexpected error (a traceback is shown)",
    ExitCode.USAGE: "wrong usage or configuration",
    ExitCode.INPUT: "a prompt file, model or reward cannot be used, or training cannot go on",
    ExitCode.STATE: "pool, checkpoint, run directory or disk is in the way or damaged",
    ExitCode.INTERRUPTED: "interrupted cleanly; the same command resumes",
    ExitCode.KILLED: "quit at once (second Ctrl-C)",
}

_CODES: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (ConfigError, ExitCode.USAGE),
    (DataError, ExitCode.INPUT),
    (ModelError, ExitCode.INPUT),
    (RewardError, ExitCode.INPUT),
    (TrainingError, ExitCode.INPUT),
    (PoolError, ExitCode.STATE),
    (CheckpointError, ExitCode.STATE),
    (RunDirectoryError, ExitCode.STATE),
    (UnsafeFileError, ExitCode.STATE),
    (QuarkError, ExitCode.INPUT),
    (FileNotFoundError, ExitCode.INPUT),
    (PermissionError, ExitCode.STATE),
    (IsADirectoryError, ExitCode.INPUT),
    (NotADirectoryError, ExitCode.INPUT),
    (KeyboardInterrupt, ExitCode.KILLED),
)

_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT})
"""A disk that is full, failing, read-only or over quota."""

_WAYS_OUT: tuple[tuple[type[BaseException], str], ...] = (
    (PoolLockedError, "wait for the other process to finish; a new run can have another --run-dir"),
    (PoolSnapshotError, "run the same command again: it reads the newest snapshot"),
    (PoolVersionError, "use a quark that knows this format"),
    (PoolPoisonedError, "look after the disk, then run the same command again"),
    (PoolCorruptedError, "`quark pool verify PATH` says what is damaged"),
    (CheckpointError, "`--fresh --force` starts the run again from nothing"),
)


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit status for ``error``; ``UNEXPECTED`` for one that nobody raised on purpose."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
        return ExitCode.STATE
    code = next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.UNEXPECTED)
    if code is ExitCode.UNEXPECTED and isinstance(error, OSError) and error.filename is not None:
        return ExitCode.STATE  # the system refused a path, and its message names both
    return code


def way_out_of(error: BaseException) -> str | None:
    """What to do about ``error`` where its message cannot know, or None."""
    return next((text for kind, text in _WAYS_OUT if isinstance(error, kind)), None)
