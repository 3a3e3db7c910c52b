"""A child that shares the memory of the test."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable


def is_true_in_a_fork(say: Callable[[], bool]) -> bool:
    """Whether ``say`` returns True in a forked child, in 20 seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads, on purpose
        child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if say() else 2
        finally:
            os._exit(status)
    timer = threading.Timer(20, os.kill, (child, 9))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    return status == 0
