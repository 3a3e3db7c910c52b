"""The exit statuses of the process, and the errors that lead to them.

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
from quark.refusals import advice_for, way_on


class ExitCode(IntEnum):
    """Exit status of every command."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    INPUT = 3
    STATE = 4
    INTERRUPTED = 75
    KILLED = 130
    UNREAD = 141


MEANINGS: dict[ExitCode, str] = {
    ExitCode.OK: "done",
    ExitCode.UNEXPECTED: "unexpected error (a traceback is shown)",
    ExitCode.USAGE: "wrong usage or configuration",
    ExitCode.INPUT: "a prompt file, model or reward cannot be used, or training cannot continue",
    ExitCode.STATE: "pool, checkpoint, run directory or disk is damaged or blocked",
    ExitCode.INTERRUPTED: "interrupted cleanly; the same command resumes",
    ExitCode.KILLED: "quit at once (second Ctrl-C)",
    ExitCode.UNREAD: "the reader of the output closed it",
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
    (BrokenPipeError, ExitCode.UNREAD),
)

_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT})
"""A disk that is full, failing, read-only or over quota."""

_WAYS_OUT: tuple[tuple[type[BaseException], str], ...] = (
    (PoolLockedError, "wait for the other process to finish; a new run can have another --run-dir"),
    (PoolSnapshotError, "run the same command again: it reads the newest snapshot"),
    (PoolVersionError, "use a newer quark, which knows this format"),
    (PoolPoisonedError, "check the disk, then run the same command again"),
    (PoolCorruptedError, "`quark pool verify PATH` says what is damaged"),
)


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit status for ``error``; ``UNEXPECTED`` for an error that quark did not raise on purpose."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
        return ExitCode.STATE
    code = next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.UNEXPECTED)
    if code is ExitCode.UNEXPECTED and isinstance(error, OSError) and error.filename is not None:
        return ExitCode.STATE  # the system refused a path, and its message names both
    return code


def way_out_of(error: BaseException) -> str | None:
    """What to do about ``error`` if its message does not say, or None."""
    if isinstance(error, OSError) and advice_for(error) is not None:
        return way_on(error)
    return next((text for kind, text in _WAYS_OUT if isinstance(error, kind)), None)
