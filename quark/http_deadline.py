"""One deadline for a whole HTTP exchange.

The timeouts of an HTTP client hold for each wait for bytes: a server that sends one byte a second keeps a
request open as long as it likes. Here every wait on a socket ends at the deadline of its thread's exchange,
whether it connects, sends, or reads headers or a body.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2


class Deadline:
    """When the exchange of each thread has to be over.

    A synchronous client performs an exchange in the thread that asks for it, so threads that share a client
    have deadlines of their own.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Every wait of this thread ends ``seconds`` from now, with ``httpx2.ReadTimeout``."""
        self._of_thread.at = time.monotonic() + seconds
        self._of_thread.seconds = seconds
        try:
            yield
        finally:
            del self._of_thread.at

    def left_s(self, wait_s: float | None) -> float | None:
        """The part of a wait that fits.

        Raises:
            httpx2.ReadTimeout: the deadline has passed.
        """
        at: float | None = getattr(self._of_thread, "at", None)
        if at is None:
            return wait_s
        left = at - time.monotonic()
        if left <= 0:
            raise httpx2.ReadTimeout(f"no whole answer within {self._of_thread.seconds:g} s")
        return left if wait_s is None else min(wait_s, left)

    def govern(self, client: httpx2.Client) -> None:
        """Have all connections of ``client``, through proxies too, end their waits at the deadline."""
        # The client takes no network backend of ours, so it is put where the client keeps its own.
        transports: list[Any] = [client._transport, *client._mounts.values()]
        for transport in transports:
            if transport is not None:
                pool = transport._pool
                pool._network_backend = _Backend(pool._network_backend, self)


class _Backend:
    """Opens connections whose waits end at the deadline."""

    def __init__(self, backend: Any, deadline: Deadline) -> None:  # noqa: ANN401 - httpcore2's
        self._backend = backend
        self._deadline = deadline

    def connect_tcp(self, *address: Any, timeout: float | None = None, **options: Any) -> _Stream:  # noqa: ANN401
        stream = self._backend.connect_tcp(
            *address, timeout=self._deadline.left_s(timeout), **options
        )
        return _Stream(stream, self._deadline)

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


class _Stream:
    """A connection whose waits end at the deadline."""

    def __init__(self, stream: Any, deadline: Deadline) -> None:  # noqa: ANN401 - httpcore2's
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data: bytes = self._stream.read(max_bytes, timeout=self._deadline.left_s(timeout))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout=self._deadline.left_s(timeout))

    def start_tls(self, *arguments: Any, timeout: float | None = None, **options: Any) -> _Stream:  # noqa: ANN401
        stream = self._stream.start_tls(
            *arguments, timeout=self._deadline.left_s(timeout), **options
        )
        return _Stream(stream, self._deadline)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - httpcore2's
        return self._stream.get_extra_info(info)
