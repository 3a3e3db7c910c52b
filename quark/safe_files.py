"""Files of a folder that somebody else may have filled: read without being led out of it.

A run or a model folder may come from a stranger. A link in it can lead to a private file, and a named pipe or a device
under a known name can hang a reader or fill its memory. The functions here follow a link only if it stays within the
folder, open plain files only, and read a bounded number of bytes.

They guard against what lies in the folder, not against a process that changes the folder meanwhile.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from quark.errors import UnsafeFileError

MAX_BYTES = 1 << 26
"""Longest file that is read as a whole: 64 MiB. Settings and states are far below it."""
MAX_LINE_BYTES = 1 << 24
"""Longest line that is read as a whole: 16 MiB."""

_OPEN_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)  # opening a named pipe does not wait for a writer
    | getattr(os, "O_BINARY", 0)
)


def contained(path: Path, root: Path) -> Path:
    """``path`` as it is, if it lies within ``root`` once its links are followed. It need not exist.

    The files of a Hub snapshot may be links to the blobs of their own repository: that is how the Hub's cache is laid out.

    Raises:
        UnsafeFileError: a link leads out of ``root``.
    """
    real, real_root = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if real.is_relative_to(real_root) or _is_blob_of_snapshot(real, real_root):
        return path
    raise UnsafeFileError(
        f"{path} is a link out of {root}, to {real}: links may not leave a run or model folder. Put the file or folder "
        "itself in its place"
    )


def is_contained(path: Path, root: Path) -> bool:
    """Whether ``contained`` accepts ``path``."""
    try:
        contained(path, root)
    except UnsafeFileError:
        return False
    return True


def check_tree(path: Path, root: Path) -> None:
    """Check ``path`` and everything below it before code that takes paths reads or writes there.

    Args:
        path: a file or a folder; it need not exist.
        root: the folder that no link may leave.

    Raises:
        UnsafeFileError: a link leads out of ``root``, or an entry is a named pipe, a socket or a device.
        OSError: a folder cannot be listed.
    """
    pending = [path]
    while pending:
        entry = pending.pop()
        try:
            mode = entry.lstat().st_mode
            is_link = stat.S_ISLNK(mode)
            if is_link:
                mode = contained(entry, root).stat().st_mode
        except FileNotFoundError:  # not there, or a dangling link that stays within
            continue
        if stat.S_ISDIR(mode):
            # Do not follow links to folders: a target inside the root is visited on its own.
            pending += () if is_link else entry.iterdir()
        elif not stat.S_ISREG(mode):
            raise _not_plain(entry)


def open_plain(path: Path, root: Path) -> BinaryIO:
    """A plain file within ``root``, opened for reading.

    Raises:
        FileNotFoundError: there is none.
        UnsafeFileError: a link leads out of ``root``, or it is not a plain file.
        OSError: it cannot be opened.
    """
    descriptor = os.open(os.path.realpath(contained(path, root)), _OPEN_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_plain(path)
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, root: Path, *, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a plain file within ``root``.

    Raises:
        FileNotFoundError: there is none.
        UnsafeFileError: a link leads out of ``root``, it is not a plain file, or has more than ``limit`` bytes.
        OSError: it cannot be read.
    """
    with open_plain(path, root) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UnsafeFileError(f"{path} has more than {limit:,} bytes, which is not a file of quark")
    return content


def read_text(path: Path, root: Path, *, limit: int = MAX_BYTES) -> str:
    """The UTF-8 text of a plain file within ``root``; errors as in ``read_bytes``, and ValueError for other bytes."""
    return read_bytes(path, root, limit=limit).decode("utf-8")


def lines(path: Path, root: Path, *, limit: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """The lines of a plain file within ``root``, one at a time. Of a longer line than ``limit`` bytes, only that many.

    Raises:
        FileNotFoundError: there is none.
        UnsafeFileError: a link leads out of ``root``, or it is not a plain file.
        OSError: it cannot be read.
    """
    with open_plain(path, root) as file:
        while line := file.readline(limit):
            yield line
            while len(line) == limit and not line.endswith(b"\n"):
                line = file.readline(limit)


def _is_blob_of_snapshot(real: Path, real_root: Path) -> bool:
    """Whether ``real`` is a blob of the Hub repository whose snapshot is ``real_root``."""
    repository = real_root.parent.parent
    return real_root.parent.name == "snapshots" and real.parent == repository / "blobs"


def _not_plain(path: Path) -> UnsafeFileError:
    return UnsafeFileError(f"{path} is not a plain file: remove it, or put the file itself there")
