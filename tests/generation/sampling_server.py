"""A server that samples, on this machine: a completions endpoint over a socket, a real model behind it.

It loads the folders that it is told to, as any other program would, and answers with what
``TransformersGenerator`` samples from them. What it can be told to get wrong is one answer at a time.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from quark.generation.base import SamplingConfig
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.loading import load_saved_policy
from quark.models.policy import Policy
from quark.types import FinishReason, Prompt

Fault = Callable[[dict[str, Any]], "int | str | dict[str, Any]"]
"""From a right answer to a status, a text, ``"hang up"``, ``"sleep"`` or another answer."""


@dataclass
class SamplingServer:
    """What the server has and has been asked."""

    policy: Policy | None = None
    loaded: list[Path] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    """For the next answers, the first one first."""
    is_deaf: bool = False
    """Takes no other weights any more, and says nothing of it."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, body: dict[str, Any]) -> int | str | dict[str, Any]:
        with self.lock:
            if path == "/reload":
                folder = Path(body["weights"]["path"])
                self.loaded.append(folder)
                if self.policy is None or not self.is_deaf:
                    self.policy = load_saved_policy(folder)
                return ""
            self.requests.append(body)
            fault = self.faults.pop(0) if self.faults else None
            choice = self.complete(body)
        right = {"choices": [choice]}
        return right if fault is None else fault(right)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert self.policy is not None, "no weights yet"
        tokens = self.policy.reward_tokens
        prompt = tuple(body["prompt"])
        quantile = tokens.ids.index(prompt[0]) if prompt[0] in tokens.ids else None
        config = SamplingConfig(
            max_new_tokens=body["max_tokens"],
            min_new_tokens=body["min_tokens"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"],
        )
        generator = TransformersGenerator(
            self.policy, self.policy.tokenizer, tokens, config, torch.device("cpu")
        )
        rest = prompt if quantile is None else prompt[1:]
        (sampled,) = generator.generate(
            [Prompt(index=0, text="", token_ids=rest)], quantile=quantile, seed=body["seed"]
        )
        ids = sampled.token_ids.tolist()
        with torch.no_grad():
            # Over all columns, as servers have it.
            logits = self.policy.model(torch.tensor([[*prompt, *ids]])).logits[
                0, len(prompt) - 1 : -1
            ]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        return {
            "index": 0,
            "text": sampled.text,
            "token_ids": ids,
            "prompt_token_ids": list(prompt),
            "finish_reason": "stop" if sampled.finish_reason is FinishReason.STOP else "length",
            "logprobs": {"token_logprobs": logprobs.tolist()},
        }


@contextmanager
def serving() -> Iterator[tuple[SamplingServer, dict[str, Any]]]:
    """A server and the settings that lead to it."""
    state = SamplingServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(405)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.keys.add(self.headers.get("Authorization"))
            answer = state.answer(self.path, body)
            if answer == "hang up":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            if answer == "sleep":
                time.sleep(1.0)
            status = answer if isinstance(answer, int) else 200
            text = json.dumps(answer) if isinstance(answer, dict) else str(answer)
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client gave up waiting

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield (
            state,
            {
                "url": f"{address}/v1/completions",
                "reload_url": f"{address}/reload",
                "reload_body": '{"weights": {"path": "{path}"}}',
                "backoff_s": 0.001,
                "max_backoff_s": 0.01,
            },
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
