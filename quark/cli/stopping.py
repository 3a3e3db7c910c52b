"""Ctrl-C and SIGTERM: the first asks the run to stop, the second exits.

The first signal calls ``ask`` (the trainer finishes its step and writes a checkpoint); the second ends
the process at once, which is safe because everything durable is published atomically.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType

from quark.cli.exit_codes import ExitCode

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal:
    """While entered, routes the first SIGINT or SIGTERM to ``ask`` and exits on the second.

    A signal that arrives before ``ask`` is set is remembered and passed on when it is.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._ask: Callable[[], None] | None = None
        self._is_asked = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopOnSignal:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def ask_through(self, ask: Callable[[], None]) -> None:
        """From now on, a first signal calls ``ask``."""
        self._ask = ask
        if self._is_asked:
            ask()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_asked:
            sys.stderr.flush()
            os._exit(ExitCode.KILLED)
        self._is_asked = True
        self._say("stopping after this step; Ctrl-C again quits at once")
        if self._ask is not None:
            self._ask()
