"""Whether somebody writes a pool, asked without opening it."""

from __future__ import annotations

from pathlib import Path

from quark.errors import UnsafeFileError
from quark.safe_files import open_plain

LOCK_FILE = "LOCK"
"""The file in a pool's directory that its writer holds a lock on (quark_pool_rs/FORMAT.md)."""


def has_writer(pool: Path) -> bool | None:
    """Whether a process has ``pool`` open for writing; None where the system does not tell.

    The lock is taken for a moment, shared and on a descriptor for reading: nothing is written. A named pipe in
    its place, or a link out of the folder that the pool lies in, is neither waited for nor followed.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    try:
        with open_plain(pool / LOCK_FILE, pool.parent) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except (OSError, UnsafeFileError):
        return None
    return False
