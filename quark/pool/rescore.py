"""Scoring a pool anew: another reward, and not a token generated again.

Texts stream through the scorer in chunks; every chunk of scores is a durable commit of a draft, so that
an interrupted re-scoring goes on where it stopped. The last commit switches the column over.
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
"""Prompts (N texts) and completions (N texts) to scores [N], higher is better, NaN = not scored."""

Decoder: TypeAlias = Callable[[Sequence[NDArray[np.uint32]]], Sequence[str]]
"""Completions as token ids to their texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """What a re-scoring did."""

    num_samples: int
    num_resumed: int
    """Those among them whose scores an earlier, interrupted attempt had made."""
    num_failed: int
    """Those scored now that got NaN."""


def rescore(
    pool: SamplePool,
    name: str,
    scorer: Scorer,
    *,
    source: Mapping[str, Json] | None = None,
    chunk_size: int = RESCORING_CHUNK,
    decode: Decoder | None = None,
    restart: bool = False,
    on_chunk: Callable[[int, int], object] | None = None,
) -> Rescored:
    """Write the score column ``name`` anew (or for the first time) for every sample there is, then switch to it.

    Until the end every handle ranks by the scores of before, and so do snapshots of before for ever. When
    it is interrupted, or the scorer raises, call it again: it goes on where the draft ends.

    Args:
        pool: open for writing.
        name: a new column, or one whose next version this is.
        scorer: called with at most ``chunk_size`` samples at a time, in id order.
        source: what makes the scores; kept with the column and shown by ``pool.info()``. A draft goes on
            only under the source that it was begun with.
        chunk_size: samples per commit.
        decode: for a pool that stores no text.
        restart: discard what an earlier attempt has left instead of going on.
        on_chunk: told how many of how many samples are scored.

    Raises:
        ValueError: a name that no column can have, an empty pool, no text and no ``decode``, a draft of another
            source, all before anything is scored; or a scorer that does not return one number per completion.
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
        returned = scorer([s.prompt_text for s in samples], completions)
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
