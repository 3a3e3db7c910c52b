"""Ctrl-C, or *Interrupt* in a notebook, while a training runs: the first stops it cleanly, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_interrupt(
    say: Callable[[str], object],
) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Route the first SIGINT to a function; the next one raises KeyboardInterrupt as usual.

    Yields a function that takes this function. Before it was called, and outside of the main thread, SIGINT does what
    it did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda _ask: None
        return
    before = signal.getsignal(signal.SIGINT)

    def route(ask: Callable[[], None]) -> None:
        def handle(_number: int, _frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, before)
            say("stopping after this step; interrupt again to stop at once")
            ask()

        signal.signal(signal.SIGINT, handle)

    try:
        yield route
    finally:
        signal.signal(signal.SIGINT, before)
