"""Samples that anyone can make again, to compare a pool with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from quark.pool.base import PromptRecord, Sample, SampleBatch
from quark.pool.columns import REWARD_COLUMN

VOCAB_SIZE = 1000
_WORDS = ("", "good", "bad", "naïve", "映画", "a\nb\tc", "\x00", "🎬" * 3)


def make_batch(
    key: str, scores: Mapping[str, Sequence[float]], *, content: int = 0, with_texts: bool = True
) -> SampleBatch:
    """One row per score; everything else follows from ``content``, prompts repeat between batches."""
    size = len(next(iter(scores.values())))
    rng = np.random.default_rng(content)
    lengths = rng.integers(0, 9, size)
    offsets = np.zeros(size + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    prompts = [_prompt(int(number)) for number in rng.integers(0, 12, 3)]
    return SampleBatch(
        key=key,
        prompts=prompts,
        prompt_index=rng.integers(0, len(prompts), size, dtype=np.uint32),
        completion_tokens=rng.integers(0, VOCAB_SIZE, offsets[-1], dtype=np.uint32),
        completion_offsets=offsets,
        completion_texts=(
            [_WORDS[i] for i in rng.integers(0, len(_WORDS), size)] if with_texts else None
        ),
        finish_reasons=rng.integers(0, 3, size, dtype=np.uint8),
        round=int(rng.integers(0, 100)),
        chunk=int(rng.integers(0, 100)),
        policy_step=int(rng.integers(0, 100)),
        reward_tokens=rng.integers(-1, 5, size, dtype=np.int16),
        settings=f'{{"temperature": {content % 3}}}',
        seeds=rng.integers(0, 2**64, size, dtype=np.uint64),
        logprob_policy=np.where(rng.random(size) < 0.3, np.nan, -rng.random(size)).astype(
            np.float32
        ),
        logprob_reference=np.full(size, np.nan, np.float32),
        logprob_sampled=np.where(rng.random(size) < 0.3, np.nan, -rng.random(size)).astype(
            np.float32
        ),
        scores={name: np.array(values, np.float32) for name, values in scores.items()},
    )


def numbered_batch(number: int) -> SampleBatch:
    """Batch ``number`` of a history, of 1 to 59 samples with two score columns."""
    rng = np.random.default_rng(number)
    rewards = rng.normal(size=rng.integers(1, 60)).round(1)
    rewards[rng.random(len(rewards)) < 0.1] = np.nan
    scores = {REWARD_COLUMN: rewards.tolist(), "judge": rewards[::-1].tolist()}
    return make_batch(f"history/{number}", scores, content=number)


def fields(sample: Sample) -> dict[str, object]:
    """A sample as plain values that compare by content; NaN equals NaN, -0.0 is not 0.0."""
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else repr(value)
        for name in Sample.__slots__
        for value in [getattr(sample, name)]
        if name != "scores"
    } | {"scores": {name: repr(float(value)) for name, value in sample.scores.items()}}


def _prompt(number: int) -> PromptRecord:
    rng = np.random.default_rng(number)
    return PromptRecord(
        token_ids=rng.integers(0, VOCAB_SIZE, number % 6, dtype=np.uint32),
        text=f"prompt {number} {_WORDS[number % len(_WORDS)]}",
        metadata=f'{{"number": {number}}}',
    )
