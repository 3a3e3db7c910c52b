"""A reward behind HTTP: a batch of texts out, a batch of scores back.

Request (POST, JSON): ``{"prompts": [...], "completions": [...]}``, and a list for each of ``fields``. Response: ``{"scores": [...]}``, a number or
null per completion. ``quark.http_client`` defines retries, the maximum size of an answer, and how a key is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from pydantic import field_validator

from quark.errors import RewardError
from quark.http_client import HttpSettings, JsonClient
from quark.rewards.fields import TEXTS, FieldsAsked
from quark.types import Json

_RETRIES = 4
_TIMEOUT_S = 30.0


class HttpConfig(HttpSettings):
    """The server that returns scores."""

    fields: tuple[str, ...] = ()
    """Fields of the prompts' rows that are sent along, each as a list under its name, such as ``["answer"]``."""

    @field_validator("fields")
    @classmethod
    def _fields_are_others(cls, fields: tuple[str, ...]) -> tuple[str, ...]:
        if taken := [name for name in fields if name in TEXTS]:
            raise ValueError(f"{taken[0]} is sent anyway, and a field cannot take its name")
        return fields


class HttpReward:
    """Posts batches to a server."""

    name: Final = "http"

    def __init__(
        self, config: HttpConfig, *, retries: int | None = None, timeout_s: float | None = None
    ) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            config: of the server.
            retries: number of attempts after the first; None means 4.
            timeout_s: for the whole answer to a batch; None is 30 seconds.

        Raises:
            RewardError: There is no URL, the variable of the key is not set, or the key would travel
                unencrypted to another machine.
        """
        if not config.url:
            raise RewardError("reward http needs reward.http.url")
        self._client = JsonClient(
            config,
            error=RewardError,
            wanted="scores",
            retries=_RETRIES if retries is None else retries,
            timeout_s=_TIMEOUT_S if timeout_s is None else timeout_s,
        )
        self.fields_asked: Final = FieldsAsked(
            required=frozenset(config.fields), way_out="take it out of reward.http.fields"
        )
        """Fields of the prompts' rows that are sent."""

    @property
    def provenance(self) -> Mapping[str, Json]:
        """The origin of the scores."""
        names = sorted(self.fields_asked.required)
        return {"url": self._client.url} | ({"fields": [*names]} if names else {})

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **fields: Sequence[Json]
    ) -> Sequence[float | None]:
        """Score one batch.

        Raises:
            RewardError: The server refused, did not return scores, or did not answer in
                ``1 + retries`` attempts.
        """
        texts = {"prompts": list(prompts), "completions": list(completions)}
        answer = self._client.post(
            {**texts, **{name: list(values) for name, values in fields.items()}}
        )
        value = self._client.json(answer)
        scores = value.get("scores") if isinstance(value, dict) else None
        if not isinstance(scores, list):
            raise RewardError(
                f'{self._client.url} answered without a list "scores": {self._client.shown(answer)}'
            )
        return scores

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
