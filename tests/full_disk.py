"""A disk that refuses to take more, without one."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writing past this many bytes of any file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


@contextmanager
def full_disk_for_publications() -> Iterator[None]:
    """Every file that is being published can be made and not be written: the system says that its device is full."""
    opened = os.open

    def opening(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        descriptor = opened(path, flags, mode, **more)
        if ".partial-" in Path(path).name:
            os.close(descriptor)
            return opened("/dev/full", os.O_WRONLY)
        return descriptor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opening)
        yield
