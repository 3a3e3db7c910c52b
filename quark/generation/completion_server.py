"""A server that samples: the address, the weights it has, and one completion at a time.

The protocol is the completions endpoint that vLLM and others have in common with OpenAI's, tokens in and
tokens out. Answers are checked by ``quark.generation.http_generator``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from quark.errors import ModelError
from quark.http_client import HttpSettings, JsonClient, plain_url
from quark.types import Json

_POLL_S = 1.0


class ServerConfig(HttpSettings):
    """The server that samples where ``sampling.backend`` is ``http``; its ``url`` is the completions endpoint."""

    model: str = "policy"
    """The server's name for the model."""
    reload_url: str = ""
    """Address that receives a POST when the weights have changed."""
    reload_body: str = '{"method": "reload_weights", "kwargs": {"weights_path": "{path}"}}'
    """Body of that POST: JSON in which ``{path}`` stands for the folder with the weights. The
    default is for vLLM's ``/collective_rpc``."""
    concurrency: int = Field(64, ge=1)
    """Concurrent requests. Each is one completion with its own seed; the server batches them."""
    timeout_s: float = Field(300.0, gt=0.0)
    """Longest time for one answer, from the request to its last byte, and for a reload, in seconds."""
    retries: int = Field(4, ge=0)
    """Attempts after the first if the server is overloaded, fails or closes the connection."""
    startup_timeout_s: float = Field(900.0, ge=0.0)
    """How long to wait for a server that does not answer yet, in seconds."""
    max_logprob_gap: float = Field(0.1, gt=0.0)
    """Largest mean difference, in nats per token, between the server's log-probabilities and those
    of the weights it should have; beyond it the run stops, because the server samples from
    something else."""

    @field_validator("reload_url")
    @classmethod
    def _reload_url_is_plain(cls, url: str) -> str:
        return plain_url(url)

    @field_validator("reload_body")
    @classmethod
    def _body_is_a_template(cls, body: str) -> str:
        try:
            json.loads(body)
        except ValueError as err:
            raise ValueError(f"must be JSON: {err}") from err
        if "{path}" not in body:
            raise ValueError("must have {path} where the folder's path belongs")
        return body


class CompletionServer:
    """Loads weights and samples from them, over HTTP.

    Args:
        config: its address and settings.
        say: called once if the server does not answer yet.

    Raises:
        ModelError: the variable of the key is not set, or the key would travel unencrypted.
    """

    def __init__(self, config: ServerConfig, *, say: Callable[[str], None]) -> None:
        self.config = config
        self._say = say
        self._completions = JsonClient(
            config,
            error=ModelError,
            wanted="completion",
            retries=config.retries,
            timeout_s=config.timeout_s,
            max_connections=config.concurrency,
        )
        self._reload = JsonClient(
            config,
            error=ModelError,
            wanted="sign that it has loaded the weights",
            retries=config.retries,
            timeout_s=config.timeout_s,
            url=config.reload_url,
        )
        self.version: str | None = None
        """Folder of the weights that the server last received; None if unknown."""

    @property
    def url(self) -> str:
        """The address that completion requests are sent to."""
        return self._completions.url

    def load(self, version: str, folder: Path) -> None:
        """Let the server sample from the weights in ``folder``; nothing is sent if it has them.

        Raises:
            ModelError: the server did not come up in time, refused, or failed.
        """
        if version == self.version:
            return
        self.version = None
        self._wait_until_up(folder)
        body = _filled(json.loads(self.config.reload_body), str(folder.absolute()))
        self._reload.post(body)
        self.version = version

    def complete(self, request: Mapping[str, Json]) -> Mapping[str, Any]:
        """The one choice that answers ``request``, unchecked. May be called by several threads at once.

        Raises:
            ModelError: the server did not answer, or not with one choice.
        """
        answer = self._completions.post(request)
        value = self._completions.json(answer)
        choices = value.get("choices") if isinstance(value, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ModelError(
                f'{self.url} answered without "choices" of one completion: '
                f"{self._completions.shown(answer)}"
            )
        return choices[0]

    def close(self) -> None:
        """Close the connections."""
        self._completions.close()
        self._reload.close()

    def _wait_until_up(self, folder: Path) -> None:
        deadline = time.monotonic() + self.config.startup_timeout_s
        is_told = False
        while not self._reload.is_up():
            if not is_told:
                self._say(
                    f"waiting for a server at {self.url}: start it on {folder} "
                    "(docs/generation.md has the command)"
                )
                is_told = True
            if time.monotonic() >= deadline:
                raise ModelError(
                    f"nothing answers at {self._reload.url} after {self.config.startup_timeout_s:g} s "
                    f"(sampling.http.startup_timeout_s): start a server on {folder}; the same command resumes"
                )
            time.sleep(_POLL_S)


def _filled(template: Any, path: str) -> Any:  # noqa: ANN401 - any JSON value
    """``template`` with the path in its texts; as a value, so that no character of it needs an escape."""
    if isinstance(template, str):
        return template.replace("{path}", path)
    if isinstance(template, list):
        return [_filled(item, path) for item in template]
    if isinstance(template, dict):
        return {key: _filled(item, path) for key, item in template.items()}
    return template
