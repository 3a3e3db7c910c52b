"""One call that goes on in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundCall(Generic[T]):
    """Begins ``work`` at once, in a thread that does not keep the process from ending.

    Args:
        work: is called once.
        name: of the thread.
    """

    def __init__(self, work: Callable[[], T], *, name: str) -> None:
        self._returned: list[T] = []
        self._raised: list[BaseException] = []

        def call() -> None:
            try:
                self._returned.append(work())
            except BaseException as error:
                self._raised.append(error)

        # A daemon: where the run fails or is told to leave, nobody waits for a server that does not answer.
        self._thread = threading.Thread(target=call, name=name, daemon=True)
        self._thread.start()

    def result(self) -> T:
        """Wait for what ``work`` returns; what it raised is raised here."""
        self._thread.join()
        if self._raised:
            raise self._raised[0]
        return self._returned[0]
