"""Scores a pool by another reward: what `quark pool rescore` and `Pool.rescore` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from quark.errors import PoolCorruptedError
from quark.pool.info import stored_json
from quark.pool.native import NativePool
from quark.pool.rescore import Rescored
from quark.rewards.base import RewardFunction
from quark.rewards.build import reward_provenance
from quark.rewards.config import RewardConfig
from quark.rewards.fields import require_fields
from quark.rewards.scoring import score
from quark.types import Json

_ROWS_AT_ONCE = 65536
_MERGED = "merged"
"""Stands for a message whose figures differ from chunk to chunk."""


def rescore(
    pool: NativePool,
    name: str,
    function: RewardFunction,
    config: RewardConfig,
    *,
    chunk_size: int,
    restart: bool,
    on_warning: Callable[[str], object],
    on_chunk: Callable[[int, int], object] | None = None,
) -> Rescored:
    """Score every sample of ``pool`` by ``function``, with the batches and retries of ``config``.

    Args:
        pool: open for writing.
        name: the score column.
        function: the reward.
        config: of the reward.
        chunk_size: samples per commit.
        restart: discard what an interrupted attempt has left.
        on_warning: is told once of each kind of failure.
        on_chunk: is told how many of how many samples are scored.

    Raises:
        DataError: a prompt lacks a field that the reward requires. Nothing was scored.
        PoolCorruptedError: a prompt's metadata are damaged.
        RewardError, ValueError: as ``quark.pool.rescore.rescore`` and the reward say.
    """
    require_fields(function, _rows_of_prompts(pool))
    warned: set[str] = set()

    def scorer(
        prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[str]
    ) -> NDArray[np.float32]:
        rows = {
            text: _row(text, f"the metadata of a prompt in {pool.path}") for text in set(metadata)
        }
        outcome = score(
            function,
            prompts,
            completions,
            on_error=config.on_error,
            batch_size=config.batch_size,
            retries=config.retries or 0,
            rows=[rows[text] for text in metadata],
        )
        for message in outcome.messages:
            if message not in warned:
                warned.add(message)
                on_warning(message)
        if outcome.merged_message is not None and _MERGED not in warned:
            warned.add(_MERGED)
            on_warning(outcome.merged_message)
        return outcome.scores

    return pool.rescore(
        name,
        scorer,
        with_metadata=True,
        source=reward_provenance(function),
        chunk_size=chunk_size,
        restart=restart,
        on_chunk=on_chunk,
    )


def _rows_of_prompts(pool: NativePool) -> Iterator[tuple[str, Mapping[str, Json]]]:
    """The place and the other fields of each prompt that a sample has."""
    seen: set[int] = set()
    columns = pool.scan().select("prompt_id", "prompt_metadata")
    for frame in columns.collect_batches(chunk_size=_ROWS_AT_ONCE):
        for number, text in frame.unique("prompt_id", maintain_order=True).iter_rows():
            if number not in seen:
                seen.add(number)
                place = f"{pool.path}: prompt {number}"
                yield place, _row(text, f"{place}: its metadata")


def _row(text: str, what: str) -> Mapping[str, Json]:
    row = stored_json(text, what)
    if not isinstance(row, dict):
        raise PoolCorruptedError(f"{what} is no JSON object")
    return row
