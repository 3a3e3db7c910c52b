"""Scores all samples of a pool with another reward, without generating any text.

Texts stream through the scorer in chunks. Each chunk of scores is a durable commit of a draft, so an interrupted
re-scoring continues where it stopped. The last commit replaces the column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quark.pool.base import SamplePool
from quark.pool.defaults import RESCORING_CHUNK
from quark.types import Json

Scorer: TypeAlias = Callable[[Sequence[str], Sequence[str]], ArrayLike]
"""Maps prompts (N texts) and completions (N texts) to scores [N]. Higher is better, NaN = not scored."""

RowScorer: TypeAlias = Callable[[Sequence[str], Sequence[str], Sequence[str]], ArrayLike]
"""A ``Scorer`` that also gets the prompts' metadata (N texts of JSON objects)."""

Decoder: TypeAlias = Callable[[Sequence[NDArray[np.uint32]]], Sequence[str]]
"""Maps token ids of completions to their texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """Result of a re-scoring."""

    num_samples: int
    num_resumed: int
    """Number of samples that an earlier, interrupted attempt had scored."""
    num_failed: int
    """Number of samples that got NaN in this attempt."""


def rescore(
    pool: SamplePool,
    name: str,
    scorer: Scorer | RowScorer,
    *,
    with_metadata: bool = False,
    source: Mapping[str, Json] | None = None,
    chunk_size: int = RESCORING_CHUNK,
    decode: Decoder | None = None,
    restart: bool = False,
    on_chunk: Callable[[int, int], object] | None = None,
) -> Rescored:
    """Score every sample for the column ``name``, new or existing, then switch to the new scores.

    Until the final commit, all handles use the old scores. Older snapshots keep them. After an interruption, or an
    error of the scorer, call this again: it continues where the draft ends.

    Args:
        pool: a pool that is open for writing.
        name: a new column, or an existing one to replace.
        scorer: called with at most ``chunk_size`` samples at a time, in id order.
        with_metadata: whether the scorer is a ``RowScorer``.
        source: describes the scorer. It is stored with the column and shown by ``pool.info()``. A draft can only
            be continued with the same source.
        chunk_size: samples per commit.
        decode: makes texts from tokens, for a pool that stores no text.
        restart: discard the draft of an earlier attempt instead of continuing it.
        on_chunk: called with the numbers of scored and of all samples.

    Raises:
        ValueError: before anything is scored: ``name`` is not a valid column name, the pool is empty, there is
            neither text nor ``decode``, or a draft has another source. Later: the scorer does not return one number
            per completion.
    """
    if re.fullmatch(r"[a-z0-9_.-]{1,64}", name) is None:
        raise ValueError(
            f"a score column cannot be called {name!r}: a name has 1 to 64 of the characters a-z 0-9 _ . -"
        )
    if len(pool) == 0:
        raise ValueError("the pool has no samples to score")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; at least 1 is needed")
    if restart and pool.draft_end(name) is not None:
        pool.discard_scores(name)
    made_by = json.dumps(dict(source or {}), sort_keys=True, allow_nan=False)
    drafted_by = pool.draft_source(name)
    if drafted_by not in (None, made_by):
        raise ValueError(
            f"unfinished scores {name!r} are there, made by {drafted_by}: finish them with that, or discard them "
            "(restart=True, --restart)"
        )
    removed = pool.num_removed
    begin = pool.draft_end(name) or removed
    num_resumed, num_samples = begin - removed, len(pool) - removed
    num_failed = 0
    while begin < len(pool):
        samples = pool.samples(range(begin, min(begin + chunk_size, len(pool))))
        texts = [sample.completion_text for sample in samples]
        if None in texts:
            if decode is None:
                raise ValueError(
                    "the pool stores no text, which a reward reads: give rescore() in Python a decode, which makes it "
                    "from tokens"
                )
            texts = list(decode([sample.completion_tokens for sample in samples]))
        completions = [text or "" for text in texts]
        metadata = ([s.prompt_metadata for s in samples],) if with_metadata else ()
        returned = scorer([s.prompt_text for s in samples], completions, *metadata)
        try:
            with np.errstate(over="raise"):
                scores = np.asarray(returned, dtype=np.float32)
        except FloatingPointError as error:
            raise ValueError("the scorer returned a number that float32 cannot hold") from error
        if scores.shape != (len(samples),):
            raise ValueError(
                f"the scorer returned shape {scores.shape} for {len(samples)} completions"
            )
        pool.draft_scores(name, begin, scores, source=made_by)
        num_failed += int(np.isnan(scores).sum())
        begin += len(samples)
        if on_chunk is not None:
            on_chunk(begin - removed, num_samples)
    pool.publish_scores(name)
    return Rescored(num_samples=num_samples, num_resumed=num_resumed, num_failed=num_failed)
