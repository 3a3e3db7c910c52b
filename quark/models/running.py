"""How a model can be run: with padding, with a cache, with rows that leave a batch. Tried, not assumed.

A model that cannot be run in the fastest way is run in a slower one that is correct.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quark.errors import ModelError
from quark.models.batch import pad_left
from quark.models.context import context_length

EXACT = 0.01
"""Differences of log-probabilities, in nats, that rounding explains in float32."""
COARSE = 0.5
"""The same in half precision, where a difference of this size is one or two units in the last place."""
_LENGTHS, _STEPS = (3, 8, 5), 4
"""Tokens in the made-up prompts, and tokens that follow each."""
_SHORT_LENGTHS, _SHORT_STEPS = (1, 3, 2), 2
"""For a model with a very short context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """How a model is run. The default is the fastest way.

    The gaps are the largest differences of log-probabilities in nats from one plain pass over each text, infinite
    where the model failed.
    """

    masks_padding: bool = True
    """Whether padding on the left changes nothing. If not, texts start at the first column, and completions are
    sampled in batches of prompts of one length."""
    has_cache: bool = True
    """Whether a step with the cache gives what a pass over the whole text gives."""
    masks_steps: bool = True
    """Whether steps with the cache take the mask of the whole text. Models whose cache is a state take none."""
    leave_by: str | None = "batch_select_indices"
    """The cache's method that keeps some rows only; None if no row can leave."""
    padding_gap: float = 0.0
    cache_gap: float = 0.0
    limit: float = EXACT
    """The largest gap that passes."""

    @property
    def notes(self) -> tuple[str, ...]:
        """The slower ways that are taken, each with its reason and its price."""
        notes = []
        if not self.masks_padding:
            notes.append(
                f"its log-probabilities change by {_nats(self.padding_gap)} with padding on the left: completions "
                "are sampled in batches of prompts of one length, which are smaller if the prompts' lengths differ"
            )
        if not self.has_cache:
            notes.append(
                f"its log-probabilities change by {_nats(self.cache_gap)} with its cache: each sampled token runs the "
                "whole text again, so sampling takes about as many times longer as a text has tokens, divided by two"
                if self.cache_gap
                else "it has no cache: each sampled token runs the whole text again"
            )
        elif self.leave_by is None:
            notes.append(
                "its cache cannot drop single rows: rows that have ended stay in the batch until all have ended"
            )
        return tuple(notes)


class Runnable(Protocol):
    """What can be tried: a causal model."""

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        ...

    @property
    def num_leading_positions(self) -> int:
        """Positions at the start that only a reward token takes."""
        ...

    def positions(self, attention_mask: Tensor, *, is_conditioned: bool) -> Tensor:
        """Position ids [B, L]."""
        ...

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, L, V] of texts without a reward token, by one pass."""
        ...

    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: Any = None,  # noqa: ANN401 - every architecture brings its own cache class
        *,
        running: Running,
    ) -> tuple[Tensor, Any]:
        """Logits [B, V] after the last column, and the cache."""
        ...


_known: dict[tuple[object, ...], Running] = {}
"""By architecture: what this process has tried. Only the code decides, not the values of the weights."""


def try_running(causal: Runnable) -> Running:
    """Try how a model can be run, on a few made-up texts.

    Args:
        causal: its ``running`` is ignored.

    Raises:
        ModelError: a text's logits depend on what follows it, or the model cannot be run on plain texts.
    """
    model = causal.model
    key = (
        type(model),
        tuple(
            sorted((k, repr(v)) for k, v in model.config.to_dict().items() if k not in _IRRELEVANT)
        ),
        model.dtype,
        model.device.type,
        causal.num_leading_positions,
    )
    if key not in _known:
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                _known[key] = _Trial(causal).running()
        finally:
            model.train(was_training)
    return _known[key]


_IRRELEVANT = frozenset({"vocab_size", "_name_or_path", "name_or_path", "transformers_version"})


_WAYS_TO_LEAVE = ("batch_select_indices", "reorder_cache")
"""The second is meant for beams, and takes fewer rows as well. Caches with states have no other."""


class _NoCache(Exception):  # noqa: N818 - not an error of the model
    """The model returns no cache."""


class _Trial:
    """Made-up texts, and their log-probabilities by one plain pass over each."""

    def __init__(self, causal: Runnable) -> None:
        self._causal = causal
        model = causal.model
        num_rows = model.get_input_embeddings().weight.shape[0]
        context = context_length(model.config)
        is_short = context is not None and context < max(_LENGTHS) + _STEPS
        lengths, self._steps = (_SHORT_LENGTHS, _SHORT_STEPS) if is_short else (_LENGTHS, _STEPS)
        self._lengths = list(lengths)
        # Different ids all over, whatever they mean.
        self._texts = [
            [
                1 + (i * 37 + row * 11) % max(1, min(num_rows, 250) - 1)
                for i in range(length + self._steps)
            ]
            for row, length in enumerate(lengths)
        ]
        self._limit = EXACT if model.dtype in (torch.float32, torch.float64) else COARSE
        self._name = model.config._name_or_path or type(model).__name__
        try:
            self._expected = [self._plain(text) for text in self._texts]
        except Exception as err:
            raise ModelError(
                f"{self._name} cannot be run on a plain text: {first_line(err)}"
            ) from err
        if not all(bool(torch.isfinite(rows).all()) for rows in self._expected):
            raise ModelError(
                f"{self._name} gives NaN or infinite logits on a plain text: its weights are broken, or "
                f"{str(model.dtype).removeprefix('torch.')} is too narrow for it (model.dtype)"
            )

    def running(self) -> Running:
        self._check_causality()
        padding_gap = self._gap(self._padded)
        result = Running(
            masks_padding=padding_gap <= self._limit, padding_gap=padding_gap, limit=self._limit
        )
        if not result.masks_padding:
            gap = self._gap(self._padded_on_the_right)
            if gap > self._limit:
                raise ModelError(
                    f"{self._name} cannot be run on texts of unequal length: its log-probabilities change by "
                    f"{_nats(padding_gap)} with padding on the left and by {_nats(gap)} with padding on the right"
                )
        gaps = []
        for masks_steps in (True, False):
            tried = replace(result, masks_steps=masks_steps, leave_by=None)
            try:
                gaps.append(self._gap(partial(self._stepped, tried)))
            except _NoCache:
                return replace(result, has_cache=False)
            if gaps[-1] > self._limit:
                continue
            tried = replace(tried, cache_gap=gaps[-1])
            for method in _WAYS_TO_LEAVE:
                way = replace(tried, leave_by=method)
                if self._gap(partial(self._stepped, way)) <= self._limit:
                    return way
            return tried
        return replace(result, has_cache=False, cache_gap=gaps[0])

    def _check_causality(self) -> None:
        text = self._texts[0]
        begin = self._plain(text[: -self._steps])
        gap = float((begin - self._expected[0][: len(begin)]).abs().max())
        if not gap <= self._limit:
            raise ModelError(
                f"{self._name} is not a causal language model: the log-probabilities of a text change by "
                f"{_nats(gap)} with what follows it. An encoder needs is_decoder = true in its config.json"
            )

    def _plain(self, text: list[int]) -> Tensor:
        """float32 [L, V] log-probabilities after each token of one text."""
        ids = torch.tensor([text], device=self._causal.model.device)
        return self._log_probabilities(ids, torch.ones_like(ids))[0]

    def _log_probabilities(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self._causal.logits(ids, mask)
        return logits.float().log_softmax(-1)

    def _gap(self, run: Callable[[], list[tuple[int, Tensor, int]]]) -> float:
        """The largest difference of what ``run`` gives, as (text, log-probabilities [n, V], first place)."""
        try:
            gaps = [
                float((found - self._expected[row][place : place + len(found)]).abs().max())
                for row, found, place in run()
            ]
        except (torch.OutOfMemoryError, _NoCache):
            raise
        except Exception:
            return float("inf")
        return max(gap if gap == gap else float("inf") for gap in gaps)

    def _padded(self) -> list[tuple[int, Tensor, int]]:
        ids, lengths = (t.to(self._causal.model.device) for t in pad_left(self._texts, 0))
        width = ids.shape[1]
        mask = (torch.arange(width, device=ids.device) >= (width - lengths).unsqueeze(1)).long()
        found = self._log_probabilities(ids, mask)
        return [(row, found[row, width - len(text) :], 0) for row, text in enumerate(self._texts)]

    def _padded_on_the_right(self) -> list[tuple[int, Tensor, int]]:
        width = max(map(len, self._texts))
        device = self._causal.model.device
        ids = torch.tensor(
            [text + [0] * (width - len(text)) for text in self._texts], device=device
        )
        lengths = torch.tensor([len(text) for text in self._texts], device=device)
        mask = (torch.arange(width, device=device) < lengths.unsqueeze(1)).long()
        found = self._log_probabilities(ids, mask)
        return [(row, found[row, : len(text)], 0) for row, text in enumerate(self._texts)]

    def _stepped(self, running: Running) -> list[tuple[int, Tensor, int]]:
        """Prompts in one batch and then token by token. The first row leaves half way if rows can."""
        device = self._causal.model.device
        rows, lengths = list(range(len(self._texts))), self._lengths
        if not running.masks_padding:
            rows, lengths = [0] * 3, [lengths[0]] * 3
        prompts = [self._texts[row][:length] for row, length in zip(rows, lengths, strict=True)]
        ids, counts = (t.to(device) for t in pad_left(prompts, 0))
        width = ids.shape[1]
        mask = (torch.arange(width, device=device) >= (width - counts).unsqueeze(1)).long()
        positions = self._causal.positions(mask, is_conditioned=False)
        cache, found = None, []
        for step in range(self._steps + 1):
            logits, cache = self._causal.step(ids, mask, positions, cache, running=running)
            if cache is None:
                raise _NoCache
            places = [length - 1 + step for length in lengths]
            found += [
                (row, logits[i : i + 1].float().log_softmax(-1), place)
                for i, (row, place) in enumerate(zip(rows, places, strict=True))
            ]
            if step == self._steps:
                break
            following = [
                self._texts[row][place + 1] for row, place in zip(rows, places, strict=True)
            ]
            ids = torch.tensor(following, device=device).unsqueeze(1)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            positions = positions[:, -1:] + 1
            if running.leave_by is not None and step == self._steps // 2:
                kept = torch.arange(1, len(rows), device=device)
                getattr(cache, running.leave_by)(kept)
                ids, mask, positions = ids[kept], mask[kept], positions[kept]
                rows, lengths = rows[1:], lengths[1:]
        return found


def first_line(err: BaseException) -> str:
    """The first line of an error's text, or its kind."""
    text = str(err).strip()
    return text.splitlines()[0] if text else type(err).__name__


def _nats(gap: float) -> str:
    return "an unknown amount (the model fails)" if gap == float("inf") else f"{gap:.2g} nats"
