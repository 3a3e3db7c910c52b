"""Batches for pool tests, and what it means that two pools answer the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.testing import assert_array_equal

from quark.pool.base import (
    PoolBatch,
    PromptRecord,
    Quantization,
    Sample,
    SampleBatch,
    SamplePool,
    Sampler,
)

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
        scores={name: np.array(values, np.float32) for name, values in scores.items()},
    )


def _prompt(number: int) -> PromptRecord:
    rng = np.random.default_rng(number)
    return PromptRecord(
        token_ids=rng.integers(0, VOCAB_SIZE, number % 6, dtype=np.uint32),
        text=f"prompt {number} {_WORDS[number % len(_WORDS)]}",
        metadata=f'{{"number": {number}}}',
    )


def fields(sample: Sample) -> dict[str, object]:
    """A sample as plain values that compare by content; NaN equals NaN, -0.0 is not 0.0."""
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else repr(value)
        for name in Sample.__slots__
        for value in [getattr(sample, name)]
        if name != "scores"
    } | {"scores": {name: repr(float(value)) for name, value in sample.scores.items()}}


def assert_same_content(pool: SamplePool, model: SamplePool) -> None:
    """Every sample, every column, and every score bit by bit."""
    assert len(pool) == len(model)
    assert pool.score_columns == model.score_columns
    everything = range(len(model))
    assert list(map(fields, pool.samples(everything))) == list(
        map(fields, model.samples(everything))
    )
    for name in model.score_columns:
        ours, theirs = pool.scores(name), model.scores(name)
        assert ours.dtype == np.float32
        assert_array_equal(ours, theirs)
        assert_array_equal(np.signbit(ours)[~np.isnan(ours)], np.signbit(theirs)[~np.isnan(theirs)])


def assert_same_batch(batch: PoolBatch, expected: PoolBatch) -> None:
    """Arrays equal in type, shape and content."""
    for name in PoolBatch.__slots__:
        ours, theirs = getattr(batch, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, name
        assert_array_equal(ours, theirs, err_msg=name, strict=True)


def assert_same_draws(sampler: Sampler, expected: Sampler, steps: Sequence[int]) -> None:
    """The same ids and quantiles at every step, and the same padded arrays."""
    for step in steps:
        for ours, theirs in zip(sampler.draw(step), expected.draw(step), strict=True):
            assert_array_equal(ours, theirs, err_msg=f"step {step}", strict=True)
        assert_same_batch(sampler.batch(step, pad_id=-7), expected.batch(step, pad_id=-7))


def assert_same_cut(cut: Quantization, expected: Quantization) -> None:
    """The same quantiles: counts, bounds and every label."""
    assert cut.num_quantiles == expected.num_quantiles
    assert cut.num_unranked == expected.num_unranked
    assert cut.snapshot.num_samples == expected.snapshot.num_samples
    assert_array_equal(cut.counts, expected.counts, strict=True)
    assert_array_equal(cut.lower_bounds, expected.lower_bounds, strict=True)
    assert_array_equal(cut.labels(), expected.labels(), strict=True)
    some = np.arange(cut.snapshot.num_samples, dtype=np.uint64)[::-1].copy()
    assert_array_equal(cut.labels_of(some), expected.labels_of(some), strict=True)
