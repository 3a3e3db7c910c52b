"""A reward behind HTTP: a batch of texts out, a batch of scores back.

Request (POST, JSON): ``{"prompts": [...], "completions": [...]}``. Response: ``{"scores": [...]}``, a number or
null per completion. Overload, server errors and lost connections are tried again with exponential
back-off and jitter, or after what ``Retry-After`` says; any other answer is an error at once. A key comes
from an environment variable only and is sent as a bearer token; no message ever shows it.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import httpx2
from pydantic import Field, field_validator

from quark.errors import RewardError
from quark.settings import Settings
from quark.types import Json

_RETRIED_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_LOCAL_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_RETRIES = 4
_TIMEOUT_S = 30.0
_SHOWN = 200


class HttpConfig(Settings):
    """Where the scores come from."""

    url: str = ""
    """Address that takes the POST; https, or http on this machine where a key is sent."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the bearer key; none sends no key."""
    backoff_s: float = Field(default=0.5, gt=0)
    """Wait before the first retry, in seconds; doubles with each."""
    max_backoff_s: float = Field(default=30.0, gt=0)
    """Longest wait in seconds, also where the server asks for more."""

    @field_validator("url")
    @classmethod
    def _url_is_plain(cls, url: str) -> str:
        if not url:
            return url
        parts = httpx2.URL(url)
        if parts.scheme not in {"http", "https"} or not parts.host:
            raise ValueError("must be an http or https address")
        if parts.userinfo:
            raise ValueError("must not hold a password: configurations are stored; use api_key_env")
        return url


class HttpReward:
    """Posts batches to a server."""

    name: Final = "http"

    def __init__(
        self, config: HttpConfig, *, retries: int | None = None, timeout_s: float | None = None
    ) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            config: where to.
            retries: how often a batch is tried again after the first time; None is 4 times.
            timeout_s: for connecting and for each wait for bytes; None is 30 seconds.

        Raises:
            RewardError: There is no URL, the variable of the key is not set, or the key would travel
                unencrypted to another machine.
        """
        if not config.url:
            raise RewardError("reward http needs reward.http.url")
        self._config = config
        self._retries = _RETRIES if retries is None else retries
        headers = {}
        if config.api_key_env is not None:
            url = httpx2.URL(config.url)
            if url.scheme != "https" and url.host not in _LOCAL_HOSTS:
                raise RewardError(f"{config.url}: a key is only sent over https")
            if not os.environ.get(config.api_key_env):
                raise RewardError(f"the environment variable {config.api_key_env} is not set")
            headers["Authorization"] = f"Bearer {os.environ[config.api_key_env]}"
        # No redirects: they would carry texts and key to a place nobody configured.
        self._client = httpx2.Client(
            headers=headers,
            timeout=_TIMEOUT_S if timeout_s is None else timeout_s,
            follow_redirects=False,
        )

    @property
    def provenance(self) -> Mapping[str, Json]:
        """Where the scores come from."""
        return {"url": self._config.url}

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str]
    ) -> Sequence[float | None]:
        """Score one batch.

        Raises:
            RewardError: The server refused, answered something else than scores, or did not answer in
                ``1 + retries`` attempts.
        """
        body = {"prompts": list(prompts), "completions": list(completions)}
        for attempt in range(self._retries + 1):
            cause: Exception | None = None
            asked: float | None = None
            try:
                response = self._client.post(self._config.url, json=body)
            except httpx2.TransportError as err:
                failure, cause = f"{type(err).__name__}: {err}", err
            else:
                if response.status_code not in _RETRIED_STATUSES:
                    return self._scores(response)
                failure = f"status {response.status_code}: {self._shown(response)}"
                asked = _retry_after_s(response.headers.get("Retry-After"))
            if attempt == self._retries:
                raise RewardError(
                    f"{self._config.url} gave no scores in {attempt + 1} attempts; last: {failure}"
                ) from cause
            time.sleep(self._wait_s(attempt, asked))
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _scores(self, response: httpx2.Response) -> Sequence[float | None]:
        if not response.is_success:
            raise RewardError(
                f"{self._config.url} answered status {response.status_code}: {self._shown(response)}"
            )
        try:
            answer = response.json()
        except ValueError as err:
            raise RewardError(
                f"{self._config.url} answered something else than JSON: {self._shown(response)}"
            ) from err
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise RewardError(
                f'{self._config.url} answered without a list "scores": {self._shown(response)}'
            )
        return scores

    def _shown(self, response: httpx2.Response) -> str:
        """The beginning of an answer, without the key should the server repeat it."""
        text = response.text
        if self._config.api_key_env is not None:
            _, _, key = str(self._client.headers["Authorization"]).partition(" ")
            text = text.replace(key, "[key]")
        return repr(text[:_SHOWN])

    def _wait_s(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, self._config.max_backoff_s)
        longest = min(self._config.backoff_s * 2.0**attempt, self._config.max_backoff_s)
        # Jitter, so that workers that failed together do not come back together; no score depends on it.
        return longest * random.uniform(0.5, 1.0)


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
