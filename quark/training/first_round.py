"""A first round that is there already: the samples of another pool take the place of the first exploration.

They are copied once, all or none, as the chunks that the exploration would have committed. From then on the run is like
any other, and the other pool is not needed any more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from quark.config.schema import RunConfig
from quark.errors import ConfigError, DataError
from quark.models.policy import Policy
from quark.pool.columns import REWARD_COLUMN
from quark.pool.info import stored_json
from quark.pool.ingest import batch_of
from quark.pool.native import NativePool
from quark.pool.rows import TAKEN, Rows, rows_of_pool
from quark.printable import counted
from quark.rewards.base import RewardFunction
from quark.rewards.build import reward_provenance
from quark.training.events import TrainingListener
from quark.training.fit import check_tokens
from quark.training.loop.draws import chunk_key
from quark.training.state.given_round import GivenRound
from quark.types import Json, Prompt


def copy_first_round(
    into: NativePool,
    given: GivenRound,
    *,
    run_id: str,
    config: RunConfig,
    policy: Policy,
    context_length: int | None,
    held_out: Sequence[Prompt],
    reward: RewardFunction,
    listener: TrainingListener,
) -> None:
    """Append the samples of a pool to the empty pool of a run, as the chunks of its first round.

    Samples of held-out prompts are left out, and those that the model cannot be trained on.

    Args:
        into: the run's pool.
        given: the samples.
        run_id: of the run.
        config: of the run.
        policy: its tokens are the pool's.
        context_length: tokens that the model sees; None is without limit.
        held_out: prompts that the run is measured on.
        reward: of the run.
        listener: is told what was left out, and what nobody knows.

    Raises:
        ConfigError: a score column is missing, another reward scored the samples, or there are too few.
        DataError: the tokens are another model's, or the texts are missing.
        PoolCorruptedError: samples are damaged.
    """
    with NativePool.open(given.path, snapshot=given.first_round.generation) as source:
        check_tokens(source, policy, config.model.name, way_out="set model.name to")
        if config.pool.store_text and not source.settings.store_text:
            raise DataError(
                f"{given.path} stores no texts, and the run keeps them: set pool.store_text = false"
            )
        columns = _columns(source, config, listener)
        _check_reward(source, given.path, reward, listener)
        kept = _kept(source, held_out, context_length, listener)
        num_chunks = _num_chunks(config)
        if kept.size < num_chunks:
            raise ConfigError(
                f"{given.path} has {counted(kept.size, 'sample')} for the first round, whose "
                f"run.prompts_first_round in chunks of run.chunk_size make {num_chunks} commits: lower the former to "
                f"{max(kept.size, 1)} or less"
            )
        settings = json.dumps(
            {
                "from_pool": {
                    "uuid": given.first_round.pool,
                    "generation": given.first_round.generation,
                },
                "reward": dict(reward_provenance(reward)),
            },
            sort_keys=True,
        )
        sizes = [len(part) for part in np.array_split(kept, num_chunks)]
        for chunk, frame in enumerate(_chunks(source, kept, sizes)):
            rows = Rows(
                str(given.path),
                1,
                frame.select(*TAKEN, *columns).with_columns(
                    pl.lit(chunk_key(run_id, 0, chunk)).alias("key"),
                    pl.lit(0, TAKEN["round"]).alias("round"),
                    pl.lit(chunk, TAKEN["chunk"]).alias("chunk"),
                    pl.lit(0, TAKEN["policy_step"]).alias("policy_step"),
                    # The tokens of this run are other ones.
                    pl.lit(-1, TAKEN["reward_token"]).alias("reward_token"),
                    pl.lit(settings).alias("settings"),
                ),
            )
            into.append(batch_of(rows, into.settings))
        listener.on_message(
            f"round 0: {counted(kept.size, 'sample')} from {given.path}, none of them generated again"
        )


def _num_chunks(config: RunConfig) -> int:
    """Commits of the first exploration, whose last one says that it is complete."""
    run = config.run
    return -(-run.prompts_first_round * run.completions_per_prompt // run.chunk_size)


def _columns(source: NativePool, config: RunConfig, listener: TrainingListener) -> list[str]:
    """The score columns that the run takes."""
    there = source.score_columns
    wanted = [REWARD_COLUMN, *config.further_columns]
    needed = [REWARD_COLUMN, *(wanted if config.reward.members else ())]
    for name in wanted:
        if name in there:
            continue
        if name in needed:
            raise ConfigError(
                f"{source.path} has no score column {name!r}: quark pool rescore {source.path} REWARD"
                + ("" if name == REWARD_COLUMN else f" --as {name}")
            )
        listener.on_message(
            f"{source.path} has no score column {name!r}: the samples of the first round have no such score",
            level="warning",
        )
    return [name for name in wanted if name in there]


def _check_reward(
    source: NativePool, path: Path, reward: RewardFunction, listener: TrainingListener
) -> None:
    """Refuse samples that are known to have another reward's scores.

    Raises:
        ConfigError: the scores are another reward's.
    """
    now: dict[str, Json] = json.loads(json.dumps(dict(reward_provenance(reward))))
    sources = {column.name: column.source for column in source.info().score_columns}
    if sources[REWARD_COLUMN]:
        known: list[object] = [dict(sources[REWARD_COLUMN])]
    else:
        said = source.scan().select("settings").unique().collect()["settings"]
        read = [stored_json(text, f"the settings of samples in {path}") for text in said]
        known = [each.get("reward") if isinstance(each, dict) else None for each in read]
    # Samples of before the files of a reward were known do not name them.
    before = {name: value for name, value in now.items() if name != "files"}
    if any(each not in (None, now, before) for each in known):
        raise ConfigError(
            f"the samples in {path} were scored by another reward than {reward.name}, and two scales would be ranked as "
            f"one. Score a copy of them anew: quark pool fork {path} COPY, then quark pool rescore COPY {reward.name}"
        )
    if None in known:
        listener.on_message(
            f"{path} does not say which reward scored its samples: they are ranked together with those of {reward.name}",
            level="warning",
        )


def _kept(
    source: NativePool,
    held_out: Sequence[Prompt],
    context_length: int | None,
    listener: TrainingListener,
) -> NDArray[np.int64]:
    """Ids of the samples that the run can be trained on."""
    measured = {tuple(prompt.token_ids) for prompt in held_out}
    ids: list[NDArray[np.int64]] = []
    num_held_out = num_unusable = 0
    columns = source.scan().select("id", "prompt_tokens", "completion_tokens")
    for frame in columns.collect_batches(chunk_size=_ROWS_AT_ONCE):
        is_held_out = np.array(
            [tuple(tokens) in measured for tokens in frame["prompt_tokens"].to_list()], dtype=bool
        )
        prompt = frame["prompt_tokens"].list.len().to_numpy().astype(np.int64)
        completion = frame["completion_tokens"].list.len().to_numpy().astype(np.int64)
        is_unusable = (prompt == 0) | (completion == 0)
        if context_length is not None:
            # The last token is never run, which leaves a place for the reward token.
            is_unusable |= prompt + completion > context_length
        num_held_out += int(is_held_out.sum())
        num_unusable += int((is_unusable & ~is_held_out).sum())
        ids.append(frame["id"].to_numpy()[~(is_held_out | is_unusable)].astype(np.int64))
    if num_held_out:
        listener.on_message(
            f"{source.path}: {counted(num_held_out, 'sample')} of held-out prompts left out"
        )
    if num_unusable:
        listener.on_message(
            f"{source.path}: {counted(num_unusable, 'sample')} left out that the model cannot be trained on: empty, or "
            "longer than its context",
            level="warning",
        )
    return np.concatenate(ids) if ids else np.zeros(0, np.int64)


_ROWS_AT_ONCE = 65536


def _chunks(
    source: NativePool, kept: NDArray[np.int64], sizes: Sequence[int]
) -> Iterator[pl.DataFrame]:
    """The kept samples in frames of these sizes, in their order."""
    left = list(sizes)
    waiting = pl.DataFrame()
    first = source.num_removed
    for rows in rows_of_pool(source):
        # Rows come in the order of their ids, without those that were removed.
        places = kept[
            np.searchsorted(kept, first) : np.searchsorted(kept, first + rows.frame.height)
        ]
        waiting = (
            pl.concat([waiting, rows.frame[places - first]])
            if waiting.height
            else rows.frame[places - first]
        )
        first += rows.frame.height
        while left and waiting.height >= left[0]:
            size = left.pop(0)
            yield waiting[:size]
            waiting = waiting[size:]
