"""Sampling on a server: the same tokens in and out as with a local model, and every answer is checked.

Every completion is a request of its own with a seed of its own, so that it does not depend on what else the
server does at the time. Of each answer every token is looked at: it is of the base vocabulary, it ended
where it says, it is no longer than asked, and the prompt that was answered is the one that was sent. The
log-probabilities are computed here, from the weights that the server should have: they are then the figures
that training computes, and where the server's own lie far from them it samples from other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from quark.errors import ModelError
from quark.generation.base import SamplingConfig
from quark.generation.completion_server import CompletionServer
from quark.generation.prompting import CompletionTexts, PromptRules
from quark.generation.transformers_generator import evaluating
from quark.models.batch import TrainingBatch, pad_left, valid_positions
from quark.models.causal import CausalModel
from quark.models.context import context_length
from quark.models.logprobs import token_nll
from quark.models.policy import pad_id, stop_ids
from quark.models.precision import projections_for_autocast
from quark.models.reward_tokens import RewardTokens
from quark.types import Completion, FinishReason, Json, Prompt

BAN = -100.0
"""Added to the logits of columns that may not be sampled; the protocol has no minus infinity."""


class HttpGenerator:
    """Samples completions from the model of ``causal`` through a server.

    Args:
        causal: the model, here; its context begins with the reward token as any other, without a
            position of its own.
        tokenizer: decodes, and names the end-of-sequence token.
        reward_tokens: are banned.
        config: how to sample.
        device: where the model is.
        server: is given the weights, and samples.
        publish: writes the weights as they are to a folder that the server can read, where it is not
            written yet; returns a name that changes with them, and the folder.
    """

    def __init__(
        self,
        causal: CausalModel,
        tokenizer: PreTrainedTokenizerBase,
        reward_tokens: RewardTokens,
        config: SamplingConfig,
        device: torch.device,
        *,
        server: CompletionServer,
        publish: Callable[[], tuple[str, Path]],
        num_columns: int,
    ) -> None:
        self._causal = causal
        self._config = config
        self._device = device
        self._server = server
        self._publish = publish
        self._width = reward_tokens.base_vocab_size
        self._pad_id = pad_id(tokenizer)
        self._stop_ids = [i for i in stop_ids(causal.model, tokenizer) if i < self._width]
        self._bans: dict[str, Json] = {str(i): BAN for i in range(self._width, num_columns)}
        self._texts = CompletionTexts(tokenizer)
        self._rules = PromptRules(
            reward_tokens=reward_tokens,
            vocab_size=self._width,
            max_positions=context_length(causal.model.config),
            max_new_tokens=config.max_new_tokens,
        )

    def generate(
        self, prompts: Sequence[Prompt], *, quantile: int | None, seed: int
    ) -> list[Completion]:
        """One completion per prompt, in order; see ``Generator``.

        The same seed gives the same completions as far as the server keeps that promise.

        Raises:
            ValueError: an empty prompt, an id outside the base vocabulary, or a quantile that is not there.
            ModelError: prompt and completion do not fit the model's context; the server did not answer,
                or with something that the model cannot have sampled.
        """
        reward_token = self._rules.reward_token(quantile)
        self._rules.check(prompts)
        if not prompts:
            return []
        self._server.load(*self._publish())
        first = [] if reward_token is None else [reward_token]
        requests = [
            self._request([*first, *prompt.token_ids], row_seed)
            for prompt, row_seed in zip(prompts, row_seeds(seed, len(prompts)), strict=True)
        ]
        executor = ThreadPoolExecutor(self._server.config.concurrency)
        try:
            answers = list(executor.map(self._ask, prompts, requests))
        finally:
            # After one answer that will not do, the others are not asked for any more.
            executor.shutdown(cancel_futures=True)
        tokens = [answer.token_ids for answer in answers]
        logprobs = self._logprobs(prompts, tokens, reward_token)
        self._compare(answers, logprobs)
        texts = self._texts([prompt.token_ids for prompt in prompts], tokens)
        return [
            Completion(
                prompt=prompt,
                token_ids=np.array(answer.token_ids, dtype=np.uint32),
                text=text,
                finish_reason=answer.finish_reason,
                reward_quantile=quantile,
                seed=seed,
                logprob_policy=float(row.sum()),
                # The server does not say what it has tempered and truncated to.
                logprob_sampled=float(row.sum()) if self._config.is_plain else math.nan,
            )
            for prompt, answer, text, row in zip(prompts, answers, texts, logprobs, strict=True)
        ]

    def _request(self, prompt: list[int], seed: int) -> dict[str, Json]:
        """Every setting is explicit, because a server fills gaps from the model's own defaults."""
        config = self._config
        return {
            "model": self._server.config.model,
            "prompt": [*prompt],
            "max_tokens": config.max_new_tokens,
            "min_tokens": config.min_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "seed": seed,
            "stop_token_ids": [*self._stop_ids],
            "ignore_eos": False,
            "logit_bias": self._bans,
            "logprobs": 1,
            "return_token_ids": True,
            "add_special_tokens": False,
            # Keys and values that a server has kept of a prompt belong to the weights that made them.
            "cache_salt": self._server.version,
        }

    def _ask(self, prompt: Prompt, request: Mapping[str, Json]) -> _Answer:
        """One completion, checked.

        Raises:
            ModelError: it is none; names the server and the prompt.
        """
        choice = self._server.complete(request)
        try:
            return self._checked(choice, request["prompt"])
        except _Unfit as err:
            raise ModelError(f"{self._server.url} answered prompt {prompt.index} {err}") from None

    def _checked(self, choice: Mapping[str, Any], prompt: Json) -> _Answer:
        tokens = choice.get("token_ids")
        if not _is_list_of(tokens, int):
            raise _Unfit(
                'without "token_ids": it has to know return_token_ids, as vLLM does since 0.10.2'
            )
        if not tokens or len(tokens) > self._config.max_new_tokens:
            raise _Unfit(
                f"with {len(tokens)} tokens, where 1 to {self._config.max_new_tokens} were asked for"
            )
        for token in tokens:
            if not 0 <= token < self._width:
                raise _Unfit(
                    f"with token {token}, outside the base vocabulary of {self._width}: it does not "
                    "heed logit_bias"
                )
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise _Unfit("as if it had been another: the prompt's tokens came back changed")
        ends = [place for place, token in enumerate(tokens) if token in self._stop_ids]
        reason = choice.get("finish_reason")
        if reason == "stop":
            if ends != [len(tokens) - 1]:
                raise _Unfit("as ended, without one end-of-sequence token as the last")
            if len(tokens) <= self._config.min_new_tokens:
                raise _Unfit(
                    f"with an end after {len(tokens) - 1} tokens, where min_new_tokens is "
                    f"{self._config.min_new_tokens}"
                )
        elif reason == "length":
            if ends or len(tokens) != self._config.max_new_tokens:
                raise _Unfit(
                    f"as cut at the limit, with {len(tokens)} tokens of {self._config.max_new_tokens}"
                    + (" and an end among them" if ends else "")
                )
        else:
            raise _Unfit(f"with the finish reason {reason!r}, not stop or length")
        figures = choice.get("logprobs")
        logprobs = figures.get("token_logprobs") if isinstance(figures, dict) else None
        if not _is_list_of(logprobs, int | float) or len(logprobs) != len(tokens):
            raise _Unfit("without one log-probability for each token")
        return _Answer(
            token_ids=tokens,
            finish_reason=FinishReason.STOP if reason == "stop" else FinishReason.LENGTH,
            logprobs=np.array(logprobs, dtype=np.float64),
        )

    def _logprobs(
        self, prompts: Sequence[Prompt], tokens: Sequence[list[int]], reward_token: int | None
    ) -> list[NDArray[np.float64]]:
        """Of every token of every completion under the model here, over the base vocabulary."""
        lengths = [len(p.token_ids) + len(t) for p, t in zip(prompts, tokens, strict=True)]
        order = sorted(range(len(prompts)), key=lambda row: lengths[row])
        found: dict[int, NDArray[np.float64]] = {}
        model = self._causal.model
        with evaluating(model), torch.inference_mode(), projections_for_autocast(model):
            for start in range(0, len(order), self._config.batch_size):
                rows = order[start : start + self._config.batch_size]
                batch = self._batch(
                    [prompts[row].token_ids for row in rows], [tokens[row] for row in rows]
                )
                if reward_token is None:
                    inputs = batch.reference_inputs()
                else:
                    batch.reward_tokens.fill_(reward_token)
                    inputs = batch.policy_inputs()
                nll = token_nll(
                    self._causal.run(inputs), batch.targets, base_vocab_size=self._width
                )
                flat = -nll.double().cpu().numpy()
                ends = np.cumsum([len(tokens[row]) for row in rows])
                found.update(zip(rows, np.split(flat, ends[:-1]), strict=True))
        return [found[row] for row in range(len(prompts))]

    def _batch(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> TrainingBatch:
        prompt_tokens, prompt_lengths = (
            t.to(self._device) for t in pad_left(prompts, self._pad_id)
        )
        lengths = torch.tensor([len(ids) for ids in completions])
        steps = int(lengths.max())
        padded = [[*ids, *[self._pad_id] * (steps - len(ids))] for ids in completions]
        return TrainingBatch(
            reward_tokens=torch.zeros_like(prompt_lengths),
            prompt_tokens=prompt_tokens,
            prompt_lengths=prompt_lengths,
            completion_tokens=torch.tensor(padded, device=self._device),
            completion_lengths=lengths.to(self._device),
            token_index=valid_positions(lengths, steps).to(self._device),
        )

    def _compare(self, answers: Sequence[_Answer], logprobs: Sequence[NDArray[np.float64]]) -> None:
        ours = np.concatenate(logprobs)
        if not np.isfinite(ours).all():
            raise ModelError(
                "the model gave NaN or infinite logits on sampled tokens: its weights are broken"
            )
        gap = float(np.abs(np.concatenate([a.logprobs for a in answers]) - ours).mean())
        limit = self._server.config.max_logprob_gap
        if not gap <= limit or math.isnan(gap):
            raise ModelError(
                f"{self._server.url} samples from other weights than it was given: its log-probabilities "
                f"are {gap:.3g} nats per token from theirs, {limit:g} at most are expected "
                "(sampling.http.max_logprob_gap). Does its reload work, and does it return raw "
                "log-probabilities? See docs/generation.md"
            )


def row_seeds(seed: int, count: int) -> list[int]:
    """A seed of 63 bits for each row, by position."""
    return [
        int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        for row in range(count)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: NDArray[np.float64]
    """[T] as reported by the server."""


class _Unfit(Exception):  # noqa: N818 - says what is wrong with an answer
    pass


def _is_list_of(value: object, kind: Any) -> TypeGuard[list[Any]]:  # noqa: ANN401 - a type, or several
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )
