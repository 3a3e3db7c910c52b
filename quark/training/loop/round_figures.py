"""Figures and sample completions of one round."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from quark.config.schema import PoolSection
from quark.models.policy import Policy
from quark.pool.base import Sample
from quark.pool.columns import GOLD_COLUMN, REWARD_COLUMN
from quark.pool.disagreement import disagreement
from quark.text_statistics import distinct_n
from quark.training.events import RoundSummary, SampleView
from quark.training.loop.exploration import Exploration
from quark.training.loop.round_samples import RoundSamples


def sample_figures(
    samples: RoundSamples, section: PoolSection, policy: Policy, *, skipped_steps: int
) -> dict[str, object]:
    """Figures of the samples that a round brought, read back from its snapshot of the pool.

    Args:
        samples: of the round.
        section: how they were ranked.
        policy: whose tokenizer reads completions that are stored without their text.
        skipped_steps: of the round.
    """
    pool, quantization = samples.pool, samples.quantization
    everything = pool.scores(REWARD_COLUMN)
    rewards = everything[samples.new.start : samples.new.stop]
    scored = rewards[np.isfinite(rewards)].astype(np.float64)  # a sum may be beyond float32
    new = pool.samples(samples.new)
    return {
        "samples": len(pool) - pool.num_removed,
        "new_samples": len(samples.new),
        "failed_scores": int(np.isnan(rewards).sum()),
        "skipped_steps": skipped_steps,
        "reward_mean": float(scored.mean()) if scored.size else math.nan,
        "reward_std": float(scored.std()) if scored.size else math.nan,
        "reward_min": float(scored.min()) if scored.size else math.nan,
        "reward_max": float(scored.max()) if scored.size else math.nan,
        "quantile_counts": quantization.counts,
        "quantile_lower_bounds": quantization.lower_bounds,
        "tie_share": section.ranking(ensemble=samples.ensemble).tie_share(pool, quantization),
        "completion_length_mean": float(np.mean([len(s.completion_tokens) for s in new])),
        "distinct_2": distinct_n([_text(s, policy) for s in new], 2),
        "logprob_policy_mean": float(np.mean([s.logprob_policy for s in new])),
        "logprob_reference_mean": float(np.mean([s.logprob_reference for s in new])),
        **_gold_figures(samples),
        **_ensemble_figures(samples),
    }


def _gold_figures(samples: RoundSamples) -> dict[str, object]:
    """The gold reward of the new samples, and of every quantile."""
    pool, labels = samples.pool, samples.quantization.labels()
    if GOLD_COLUMN not in pool.score_columns:
        return {}
    gold = pool.scores(GOLD_COLUMN).astype(np.float64)
    by_quantile = [gold[labels == k] for k in range(samples.quantization.num_quantiles)]
    return {
        "gold_mean": _mean(gold[samples.new.start : samples.new.stop]),
        "gold_by_quantile": [_mean(values) for values in by_quantile],
    }


def _ensemble_figures(samples: RoundSamples) -> dict[str, object]:
    """How far the members of an ensemble agree."""
    if samples.ensemble is None:
        return {}
    found = disagreement(
        samples.pool,
        samples.ensemble,
        samples.quantization.labels(),
        num_quantiles=samples.quantization.num_quantiles,
        new=samples.new,
    )
    return {"ensemble": dataclasses.asdict(found)}


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def summary(
    samples: RoundSamples,
    metrics: Mapping[str, object],
    policy: Policy,
    *,
    round: int,
    num_rounds: int,
    count: int,
) -> RoundSummary:
    """A round for people: its numbers, and ``count`` of its new samples from the best and the lowest quantile."""
    ids = np.arange(samples.new.start, samples.new.stop, dtype=np.uint64)
    labels = samples.quantization.labels_of(ids)
    views = [
        [
            SampleView(
                id=sample.id,
                prompt=sample.prompt_text,
                completion=_text(sample, policy),
                reward=sample.scores[REWARD_COLUMN],
                quantile=quantile,
            )
            for sample in samples.pool.samples([int(i) for i in ids[labels == quantile][:count]])
        ]
        for quantile in (samples.quantization.num_quantiles - 1, 0)
    ]
    return RoundSummary(
        round=round,
        num_rounds=num_rounds,
        metrics={k: float(v) for k, v in metrics.items() if isinstance(v, int | float)},
        best_samples=views[0],
        worst_samples=views[1],
    )


def durations(exploration: Exploration, *, exploring: float) -> dict[str, object]:
    """Where the time of an exploration of ``exploring`` seconds went."""
    return {
        "seconds_exploring": exploring - exploration.seconds_scoring,
        "seconds_scoring": exploration.seconds_scoring,
        "seconds_by_chunk": [dataclasses.asdict(spans) for spans in exploration.spans],
    }


def _text(sample: Sample, policy: Policy) -> str:
    if sample.completion_text is not None:
        return sample.completion_text
    text = policy.tokenizer.decode(sample.completion_tokens.tolist(), skip_special_tokens=True)
    return str(text)
