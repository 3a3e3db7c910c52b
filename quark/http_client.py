"""The HTTP client for JSON servers, with retries.

Overload, server errors and lost connections are tried again with exponential back-off and jitter, or after
what ``Retry-After`` says; any other answer than a success is an error at once. An answer has a largest size,
counted after decompression, and a deadline. A key comes from an environment variable only and is sent as a
bearer token; no message ever shows it.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import httpx2
from pydantic import Field, field_validator

from quark.errors import QuarkError
from quark.http_deadline import Deadline
from quark.settings import Settings

_RETRIED_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_LOCAL_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_SHOWN = 200
_DECOMPRESSED_AT_ONCE = 1 << 16

MAX_ANSWER_BYTES: Final = 1 << 24
"""The largest answer that is read, after decompression. Longer ones hold something else than scores
or a completion."""


class HttpSettings(Settings):
    """Where a server is and how patient to be with it."""

    url: str = ""
    """Address that receives the POST. If a key is sent, it must be https, or http on this
    machine."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the bearer key; unset sends no key."""
    backoff_s: float = Field(default=0.5, gt=0)
    """Wait before the first retry, in seconds; doubles with each."""
    max_backoff_s: float = Field(default=30.0, gt=0)
    """Longest wait in seconds, even if the server asks for more."""

    @field_validator("url")
    @classmethod
    def _url_is_plain(cls, url: str) -> str:
        return plain_url(url)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A server's complete response."""

    status: int
    retry_after: str | None
    body: bytes

    @property
    def is_success(self) -> bool:
        """Whether the status code is 200 to 299."""
        return 200 <= self.status < 300


class JsonClient:
    """Posts JSON to one address.

    Args:
        settings: where to.
        error: what is raised when there is no answer, or an unfit one.
        wanted: what an answer holds, for messages ("scores").
        retries: how often a request is tried again after the first time.
        timeout_s: for one attempt, from connecting to the last byte of the answer.
        url: another address than that of the settings.
        max_connections: at once.

    Raises:
        QuarkError: as ``error``: the variable of the key is not set, or the key would travel unencrypted
            to another machine.
    """

    def __init__(
        self,
        settings: HttpSettings,
        *,
        error: type[QuarkError],
        wanted: str,
        retries: int,
        timeout_s: float,
        url: str | None = None,
        max_connections: int = 100,
    ) -> None:
        self.url = settings.url if url is None else url
        self._settings = settings
        self._error = error
        self._wanted = wanted
        self._retries = retries
        self._timeout_s = timeout_s
        # Nothing else that the library would accept: each step of this decompression can be bounded.
        headers = {"Accept-Encoding": "gzip"}
        if settings.api_key_env is not None:
            parts = httpx2.URL(self.url)
            if parts.scheme != "https" and parts.host not in _LOCAL_HOSTS:
                raise error(f"{self.url}: a key is only sent over https")
            if not os.environ.get(settings.api_key_env):
                raise error(f"the environment variable {settings.api_key_env} is not set")
            headers["Authorization"] = f"Bearer {os.environ[settings.api_key_env]}"
        # No redirects: they would carry texts and key to a place nobody configured.
        self._client = httpx2.Client(
            headers=headers,
            timeout=timeout_s,
            limits=httpx2.Limits(max_connections=max_connections),
            follow_redirects=False,
        )
        self._deadline = Deadline()
        self._deadline.govern(self._client)

    def post(self, body: object) -> Answer:
        """The answer to one request. May be called by several threads at once.

        Raises:
            QuarkError: as ``error``: the server refused, answered with more than ``MAX_ANSWER_BYTES``, or
                did not answer in ``1 + retries`` attempts.
        """
        for attempt in range(self._retries + 1):
            cause: Exception | None = None
            asked: float | None = None
            try:
                answer = self._asked(body)
            except httpx2.TransportError as err:
                failure, cause = f"{type(err).__name__}: {err}", err
            else:
                if answer.is_success:
                    return answer
                failure = f"status {answer.status}: {self.shown(answer)}"
                if answer.status not in _RETRIED_STATUSES:
                    raise self._error(f"{self.url} answered {failure}")
                asked = _retry_after_s(answer.retry_after)
            if attempt == self._retries:
                raise self._error(
                    f"{self.url} gave no {self._wanted} in {attempt + 1} attempt{'s' if attempt else ''}; last: {failure}"
                ) from cause
            time.sleep(self._wait_s(attempt, asked))
        raise AssertionError("the last attempt returns or raises")

    def json(self, answer: Answer) -> object:
        """What an answer says.

        Raises:
            QuarkError: as ``error``: it is not JSON.
        """
        try:
            value: object = json.loads(answer.body)
        except (ValueError, RecursionError) as err:
            raise self._error(
                f"{self.url} answered something else than JSON: {self.shown(answer)}"
            ) from err
        return value

    def is_up(self) -> bool:
        """Whether anything answers at the address, with whatever status."""
        try:
            with self._deadline.within(self._timeout_s), self._client.stream("GET", self.url):
                return True
        except httpx2.TransportError:
            return False

    def shown(self, answer: Answer) -> str:
        """The beginning of an answer, without the key should the server repeat it."""
        text = answer.body.decode("utf-8", "replace")
        if self._settings.api_key_env is not None:
            _, _, key = str(self._client.headers["Authorization"]).partition(" ")
            text = text.replace(key, "[key]")
        return repr(text[:_SHOWN])

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _asked(self, body: object) -> Answer:
        """One attempt."""
        received = bytearray()
        with (
            self._deadline.within(self._timeout_s),
            self._client.stream("POST", self.url, json=body) as response,
        ):
            try:
                for part in _decompressed(response):
                    received += part
                    if len(received) > MAX_ANSWER_BYTES:
                        raise self._error(
                            f"{self.url} answered with more than {MAX_ANSWER_BYTES} bytes, the most that is read"
                        )
            except (ValueError, zlib.error) as err:
                raise self._error(f"{self.url}: the answer cannot be decompressed: {err}") from err
            return Answer(
                status=response.status_code,
                retry_after=response.headers.get("Retry-After"),
                body=bytes(received),
            )

    def _wait_s(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, self._settings.max_backoff_s)
        longest = min(self._settings.backoff_s * 2.0**attempt, self._settings.max_backoff_s)
        # Jitter, so that workers that failed together do not come back together; no result depends on it.
        return longest * random.uniform(0.5, 1.0)


def plain_url(url: str) -> str:
    """``url`` as it is: an http or https address without a password, or nothing.

    Raises:
        ValueError: it is another.
    """
    if not url:
        return url
    parts = httpx2.URL(url)
    if parts.scheme not in {"http", "https"} or not parts.host:
        raise ValueError("must be an http or https address")
    if parts.userinfo:
        raise ValueError("must not hold a password: configurations are stored; use api_key_env")
    return url


def _decompressed(response: httpx2.Response) -> Iterator[bytes]:
    """The body in parts of at most 64 KiB or of what one read brings, however far it is compressed.

    Raises:
        ValueError: it is compressed in another way than was asked for.
        zlib.error: it is not what its header says.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding in ("", "identity"):
        yield from response.iter_raw()
        return
    if encoding != "gzip":
        raise ValueError(f"its Content-Encoding is {encoding[:_SHOWN]!r}, not gzip")
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)  # with gzip's header
    for compressed in response.iter_raw():
        rest = compressed
        while rest and not inflater.eof:
            yield inflater.decompress(rest, _DECOMPRESSED_AT_ONCE)
            rest = inflater.unconsumed_tail
    if not inflater.eof:
        raise ValueError("it ends early")


def _retry_after_s(header: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header, given as a number or as a date; None if there is none."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
