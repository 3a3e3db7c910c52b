"""What a round learns from: a pure function of the pool, the configuration and the round's number.

The trainer draws its batches through here, and ``explain`` recomputes them through here, so that what a
run did and what is said about it cannot come apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quark.config.schema import RunConfig, RunSection
from quark.errors import ConfigError
from quark.pool.base import Quantization, SamplePool, Sampler
from quark.pool.columns import REWARD_COLUMN
from quark.pool.native import NativePool
from quark.pool.ranking import RankingRules
from quark.pool.scope import Score, scores_by, try_condition
from quark.pool.scrambling import scramble_all
from quark.training.seeds import derive_seed


def chunk_key(run_id: str, round: int, chunk: int) -> str:
    """The idempotency key that a chunk of exploration is appended under."""
    return f"{run_id}/{round}/{chunk}"


def samples_at(pool: SamplePool, run_id: str, section: RunSection, round: int) -> int | None:
    """Samples that the pool held when the exploration of ``round`` was complete; None while it is not."""
    num_prompts = section.prompts_per_round if round else section.prompts_first_round
    num_chunks = -(-num_prompts * section.completions_per_prompt // section.chunk_size)
    ids = pool.find(chunk_key(run_id, round, num_chunks - 1))
    return None if ids is None else ids.stop


def first_snapshot_with(path: Path, num_samples: int) -> NativePool:
    """The pool as it was when it first held ``num_samples`` samples, or its newest snapshot where it holds fewer.

    Sought rather than counted: a commit can also bring scores to samples that are there. A pool without its
    older snapshots (a fork) may show its oldest one instead, with more samples.
    """

    def size_at(generation: int) -> int:
        with NativePool.open(path, snapshot=generation) as pool:
            return len(pool)

    with NativePool.open(path) as pool:
        oldest, newest = pool.oldest_generation, pool.snapshot.generation
    found = bisect_left(range(oldest, newest), num_samples, key=size_at)
    return NativePool.open(path, snapshot=oldest + found)


def columns_of(
    pool: SamplePool, names: Iterable[str], *, score: Score = REWARD_COLUMN
) -> dict[str, NDArray[Any]]:
    """[N] columns of ``pool`` by name; ``reward`` is what ``score`` gives."""
    return {
        name: scores_by(pool, score) if name == REWARD_COLUMN else pool.column(name)
        for name in names
    }


def check_scope(config: RunConfig) -> None:
    """Raise ConfigError where ``pool.where`` is no condition on the columns that the run's pool will have."""
    if config.pool.where is not None:
        try:
            try_condition(config.pool.where, (REWARD_COLUMN, *config.further_columns))
        except ValueError as error:
            raise ConfigError(f"pool.{error}") from error


def quantize(pool: SamplePool, rules: RankingRules) -> Quantization:
    """The ranking by the run's rules, with errors that name the configuration.

    Raises:
        KeyError: an unknown column.
        ConfigError: ``pool.where`` is no condition on the columns that there are.
    """
    try:
        return rules.quantize(pool)
    except ValueError as error:
        raise ConfigError(f"pool: {error}") from error


def held_out_samples(pool: SamplePool, config: RunConfig) -> NDArray[np.bool_] | None:
    """[N] whether a sample is of a prompt that ``pool.held_out_share`` keeps from the minibatches; None for no share.

    A hash of the run's seed and the prompt's number in the pool decides, so a prompt stays where it is however the
    pool grows.
    """
    share = config.pool.held_out_share
    if not share:
        return None
    seed = derive_seed(config.run.seed, "held-out part of the pool")
    held_out: NDArray[np.bool_] = scramble_all(seed, pool.column("prompt_id")) < np.uint64(
        share * 2**64
    )
    return held_out


def trained_part(pool: SamplePool, quantization: Quantization, config: RunConfig) -> Quantization:
    """The ranking without its held-out samples, its cuts where they were."""
    held_out = held_out_samples(pool, config)
    return quantization if held_out is None else quantization.only(~held_out)


def settling_sampler(pool: SamplePool, quantization: Quantization, config: RunConfig) -> Sampler:
    """The minibatches of the settling steps: step s shifts the tokens by batch s. Arguments as ``round_sampler``'s."""
    return trained_part(pool, quantization, config).sampler(
        batch_size=config.optimizer.batch_size, seed=derive_seed(config.run.seed, "settling")
    )


def round_sampler(
    pool: SamplePool, quantization: Quantization, config: RunConfig, round: int
) -> Sampler:
    """The minibatches of a round: its optimizer step s learns from batch s.

    Args:
        pool: as the round found it.
        quantization: its ranking, of held-out samples too.
        config: of the run.
        round: its number.

    Raises:
        ValueError: there is nothing to draw from.
        ConfigError: ``pool.max_uses`` leaves too few batches for the round.
    """
    section, batch_size = config.pool, config.optimizer.batch_size
    only_best = section.train_quantiles == "best"
    sampler = trained_part(pool, quantization, config).sampler(
        batch_size=batch_size,
        seed=derive_seed(config.run.seed, "minibatches", round),
        mode=section.sampling,
        quantiles=[quantization.num_quantiles - 1] if only_best else None,
        age_half_life=section.age_half_life,
        max_uses=section.max_uses,
        bucket_window=section.bucket_window,
    )
    steps = config.run.steps_per_round
    if sampler.num_batches is not None and sampler.num_batches < steps:
        raise ConfigError(
            f"pool.max_uses = {section.max_uses} leaves {sampler.num_batches} batches of {batch_size} for the "
            f"{steps} steps of round {round}: raise it, explore more, or lower optimizer.batch_size or "
            "run.steps_per_round"
        )
    return sampler
