"""Publishes files and folders atomically: stage, sync, rename, sync the directory.

Every function here guarantees:

- A reader sees the old content or the new content, whole, even after a crash or a power cut. On return the new content
  is durable. A folder that replaces another one is missing between two renames; see ``publishing_directory``.
- Nothing is written through a link. A link at the target is replaced by the file.
- Permissions follow the umask, unless a caller asks for fewer.
- A writer that fails removes what it staged. What a killed one leaves is named ``TARGET.partial-…`` and counts as nothing:
  the next publication of the same target removes it a day later, and ``clear_left_overs`` at once.
- An ``OSError`` names the target, never the staged file. ``quark.refusals.way_on`` says how to go on after it.

Other modules neither rename nor sync files themselves; ``tests/architecture`` checks it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quark import _pool_rs

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STALE_S = 86_400.0
"""Age in seconds after which a staged file counts as abandoned."""
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_SYNC_IS_UNKNOWN = frozenset({errno.EINVAL, errno.ENOTSUP})
"""How file systems refuse to sync a folder that never need it."""


class StagedFile(io.FileIO):
    """The file that is being written. Its errors name the target.

    Args:
        staged: where it is; must not exist.
        target: the path that it is for.
        mode: permissions before the umask takes its part.
    """

    failure: OSError | None = None
    """Why a write failed, for callers whose library does not pass it on."""

    def __init__(self, staged: Path, *, target: Path, mode: int) -> None:
        self._target = target
        with _named(target):
            super().__init__(staged, "xb", opener=lambda path, flags: os.open(path, flags, mode))

    def write(self, data: ReadableBuffer, /) -> int:
        """Write some of ``data`` and return how many bytes that was."""
        try:
            with _named(self._target):
                return super().write(data)
        except OSError as error:
            self.failure = error
            raise

    def write_all(self, data: bytes) -> None:
        """Write all of ``data``, in as many writes as that takes."""
        left = memoryview(data)
        while left:
            left = left[self.write(left) :]


@contextmanager
def publishing(path: Path, *, mode: int = 0o666, is_durable: bool = True) -> Iterator[StagedFile]:
    """A new file that replaces ``path`` when the block ends, and is removed where the block raises.

    Args:
        path: the target. Its folder exists.
        mode: permissions before the umask takes its part.
        is_durable: whether to sync. Without, a power cut may leave an empty file: only for what is checked when it is
            read and can be made again.

    Raises:
        FileExistsError: ``path`` is a device or a pipe, or leads to one.
        OSError: the disk refused. ``path`` is as it was, unless only the last sync of its folder failed.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileExistsError(errno.EEXIST, "is not a plain file, and none replaces it", str(path))
    _clear_stale(path)
    staged = _staged(path)
    try:
        with StagedFile(staged, target=path, mode=mode) as file:
            yield file
            if is_durable:
                with _named(path):
                    os.fsync(file.fileno())
        with _named(path):
            staged.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    if is_durable:
        with _named(path):
            _sync_directory(path.parent)


def publish_file(
    path: Path, content: bytes | str, *, mode: int = 0o666, is_durable: bool = True
) -> None:
    """Replace ``path`` by a file of this content; text is UTF-8. Arguments and errors as in ``publishing``."""
    data = content.encode() if isinstance(content, str) else content
    with publishing(path, mode=mode, is_durable=is_durable) as file:
        file.write_all(data)


@contextmanager
def publishing_directory(final: Path, *, is_replacing: bool = False) -> Iterator[Path]:
    """A new folder that becomes ``final`` when the block ends, and is removed where the block raises.

    Args:
        final: the target. Its parent exists.
        is_replacing: whether to replace an existing folder. While the two are swapped, the old one is
            ``NAME.previous``; after a crash, the next writer restores it. Only for a target with one writer at a time.

    Raises:
        FileExistsError: ``final`` exists and is not to be replaced.
        ValueError: something that is neither a file nor a folder was put into the new one.
        OSError: the disk refused. ``final`` is as it was, unless only the last sync of its parent failed.
    """
    _clear_stale(final)
    previous = final.with_name(f"{final.name}.previous")
    if is_replacing:
        clear_left_overs(final)
        _bring_back(previous, final)
    staged, durable = _staged(final), _staged(final)
    try:
        with _named(final):
            staged.mkdir()
        yield staged
        with _named(final):
            if is_replacing and final.exists():
                # Synced before the old one moves, so that the target is missing between two renames and no longer.
                publish_directory(staged, durable)
                final.rename(previous)
                publish_directory(durable, final)
            else:
                publish_directory(staged, final)
    except BaseException:
        for path in (staged, durable):
            shutil.rmtree(path, ignore_errors=True)
        if is_replacing:
            with contextlib.suppress(OSError):
                _bring_back(previous, final)
        raise
    if is_replacing:
        shutil.rmtree(previous, ignore_errors=True)


def publish_directory(staged: Path, final: Path) -> None:
    """Sync every file in ``staged`` and the directory, rename it to ``final``, sync the parent.

    On return ``final`` survives a power cut with all that was in ``staged``; before the rename nothing is
    visible under that name. Both must lie in one directory.

    Raises:
        FileExistsError: ``final`` exists.
        ValueError: ``staged`` lies elsewhere, or holds something that is neither a file nor a directory.
    """
    _pool_rs.publish_directory(staged, final)


class AppendedFile:
    """A file that grows by whole records.

    Args:
        path: made where missing.
        keep: cut the file to this many bytes first.

    Raises:
        OSError: it cannot be opened, or is a link.
    """

    def __init__(self, path: Path, *, keep: int) -> None:
        self._path = path
        with _named(path):
            # Without a buffer: what a full disk refused would be tried again by closing, and fail without a name.
            self._file = io.FileIO(
                path, "ab", opener=lambda name, flags: os.open(name, flags | _NO_LINKS, 0o666)
            )
        self._is_listed = False
        if self._file.tell() > keep:
            self._cut(keep)

    def append(self, record: bytes) -> None:
        """Add a record; it is handed to the operating system before this returns.

        Raises:
            OSError: the disk refused, and nothing of the record is in the file.
        """
        begin = self._file.tell()
        left = memoryview(record)
        try:
            with _named(self._path):
                while left:
                    left = left[self._file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._cut(begin)  # the next record begins where this one did
            raise

    def sync(self) -> int:
        """Make the records durable and return the file's length in bytes."""
        with _named(self._path):
            os.fsync(self._file.fileno())
            if not self._is_listed:
                _sync_directory(self._path.parent)
                self._is_listed = True
        return self._file.tell()

    def close(self) -> None:
        """Close the file without a ``sync``: records after the last one may not be durable."""
        self._file.close()

    def _cut(self, length: int) -> None:
        self._file.truncate(length)
        self._file.seek(length)


def set_aside(path: Path) -> None:
    """Let a file or folder that is of no use make way: it becomes a left-over of its own target.

    Raises:
        OSError: the disk refused.
    """
    with _named(path):
        path.rename(_staged(path))


def left_overs(final: Path) -> list[Path]:
    """What writers of ``final`` left beside it, or are writing just now."""
    named = re.compile(rf"{re.escape(final.name)}\.partial(-[0-9a-f]{{8}})?")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return [path for path in final.parent.iterdir() if named.fullmatch(path.name)]
    return []


def clear_left_overs(final: Path) -> None:
    """Remove files left by killed writers. Call only as the sole writer of ``final``."""
    for path in left_overs(final):
        _remove(path)


def clear_older_left_over(final: Path) -> None:
    """Remove ``NAME.partial``, as killed writers of older releases left it. Only in a folder that is quark's own."""
    _remove(final.with_name(f"{final.name}.partial"))


def _clear_stale(final: Path) -> None:
    """Remove what a killed writer left a day ago or earlier: another one may be writing now."""
    with contextlib.suppress(OSError):
        for path in left_overs(final):
            is_ours = not path.name.endswith(".partial")  # that name may be a user's own
            if is_ours and time.time() - path.lstat().st_mtime > _STALE_S:
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _bring_back(previous: Path, final: Path) -> None:
    """Restore what a writer moved out of the way and did not replace; drop it where it was replaced."""
    if not previous.is_dir() or previous.is_symlink():
        return
    if final.exists():
        shutil.rmtree(previous, ignore_errors=True)
    else:
        previous.rename(final)


def _staged(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in _SYNC_IS_UNKNOWN:
            raise
    finally:
        os.close(directory)


@contextmanager
def _named(target: Path) -> Iterator[None]:
    """Within: an error of the system names ``target``."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename == str(target):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
