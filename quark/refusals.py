"""Advice for errors of the operating system, chosen by cause."""

from __future__ import annotations

import errno
import re

_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give this user access to it"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (`ulimit -n`)"),
    errno.EIO: "look after the disk",
}
_SAYS_NOTHING = frozenset(
    {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}
)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust, such as safetensors, tell the system's error."""


def advice_for(error: BaseException) -> str | None:
    """What to do before the same command where the system's refusal is known, such as "make room"."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _OS_ERROR.search(str(error))):
        number = int(found[1])
    return None if number is None else _ADVICE.get(number)


def way_on(error: BaseException) -> str:
    """How the same command goes on after ``error``, for the end of a message."""
    advice = advice_for(error)
    if advice is None:
        return "run the same command once the cause is gone"
    return f"{advice} and run the same command"


def says_nothing_of_the_bytes(error: OSError) -> bool:
    """Whether the error says nothing about the file's contents."""
    return error.errno in _SAYS_NOTHING
