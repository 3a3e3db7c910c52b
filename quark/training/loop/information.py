"""What a round measures on samples that it has not learned from: newly explored ones, and the held-out part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from quark.config.schema import RunConfig
from quark.evaluation.information import Information, LabelledSamples, completion_logprobs
from quark.models.policy import Policy
from quark.pool.base import Quantization, SamplePool
from quark.pool.columns import REWARD_COLUMN
from quark.training.loop.draws import held_out_samples
from quark.training.processes.memory import memory_needed_for
from quark.training.processes.process_group import ProcessGroup
from quark.training.processes.weights import Weights

MOST_SAMPLES = 512
"""Samples of a measurement, the newest rounds' first: each takes K forward passes."""


class InformationMeter:
    """Measures the policy's ``Information`` on samples; the same figures in every process.

    Args:
        config: the effective configuration.
        policy: is measured.
        processes: the processes that train it.
        weights: where the policy's lie among them; where no process has all, all of them make the passes.
        autocast: the context for forward passes.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        policy: Policy,
        processes: ProcessGroup,
        weights: Weights,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._config = config
        self._policy = policy
        self._processes = processes
        self._weights = weights
        self._autocast = autocast

    @property
    def measures_fresh(self) -> bool:
        """Whether each round's new samples are measured: a contrast or a held-out part asks for it."""
        return bool(self._config.objective.contrast_coef or self._config.pool.held_out_share)

    def fresh(
        self,
        pool: SamplePool,
        quantization: Quantization,
        new: range,
        *,
        bounds: Sequence[float] | None,
    ) -> dict[str, float]:
        """The figures of this round's new samples, before anything is learned from them, as the round's row has them.

        Empty where ``measures_fresh`` is not. All NaN in the first round, whose tokens mean nothing yet.

        Args:
            pool: with the new samples.
            quantization: of it.
            new: their ids.
            bounds: [K] lowest reward of each quantile in the round before: what the tokens were trained to mean.
                None in the first round.
        """
        if not self.measures_fresh:
            return {}
        if bounds is None:
            return _named(None, "fresh")
        samples = newest(pool, quantization, np.arange(new.start, new.stop, dtype=np.uint64))
        if not self._config.pool.per_prompt:
            samples = replace(samples, labels=labels_by(bounds, samples.rewards))
        return _named(self.measure(samples), "fresh")

    def held_out(self, pool: SamplePool, quantization: Quantization) -> LabelledSamples | None:
        """The samples of the held-out part that are measured; None without such a part."""
        is_held_out = held_out_samples(pool, self._config)
        if is_held_out is None:
            return None
        return newest(pool, quantization, np.flatnonzero(is_held_out).astype(np.uint64))

    def measure_held_out(self, samples: LabelledSamples | None) -> dict[str, float]:
        """The figures of ``held_out``, as the round's row has them; empty without a held-out part."""
        return {} if samples is None else _named(self.measure(samples), "held_out")

    def measure(self, samples: LabelledSamples) -> Information | None:
        """The figures of ``samples``; None where there are none, or a single token that is compared with nothing."""
        if not len(samples) or self._config.pool.num_quantiles == 1:
            return None

        def logprobs() -> NDArray[np.float64]:
            size = self._config.sampling.batch_size
            with (
                self._autocast(),
                memory_needed_for("measuring the tokens", setting="sampling.batch_size"),
            ):
                return completion_logprobs(self._policy, samples, batch_size=size)

        measured: NDArray[np.float64] | None = None
        if self._weights.is_sharded:
            with self._processes.exchange():
                measured = logprobs()
            self._weights.release()
        found = np.array(
            self._processes.from_main_process(
                lambda: (logprobs() if measured is None else measured).tolist()
            )
        )
        return Information.of(
            found,
            samples.labels,
            samples.rewards,
            temperature=self._config.objective.contrast_temperature,
        )


def labels_by(bounds: Sequence[float], rewards: NDArray[np.float32]) -> NDArray[np.int16]:
    """[N] the highest quantile whose lowest reward each of ``rewards`` [N] reaches, or 0; NaN bounds an empty one."""
    reaches = rewards[:, None] >= np.array(bounds, dtype=np.float32)
    highest = len(bounds) - 1 - reaches[:, ::-1].argmax(axis=1)
    return np.where(reaches.any(axis=1), highest, 0).astype(np.int16)


def newest(
    pool: SamplePool, quantization: Quantization, ids: NDArray[np.uint64]
) -> LabelledSamples:
    """Those of ``ids`` that have a quantile, at most ``MOST_SAMPLES``, the newest rounds' first."""
    ids = ids[ids >= pool.num_removed]
    labels = quantization.labels_of(ids)
    ids, labels = ids[labels >= 0], labels[labels >= 0]
    rounds = pool.column("round")[ids].astype(np.int64)
    chosen = np.argsort(-rounds, kind="stable")[:MOST_SAMPLES]
    return LabelledSamples(
        pool=pool,
        ids=ids[chosen],
        labels=labels[chosen],
        rewards=pool.scores(REWARD_COLUMN)[ids[chosen]],
    )


def _named(figures: Information | None, which: str) -> dict[str, float]:
    names = {
        "information": "information",
        "error": "information_error",
        "label_accuracy": "label_accuracy",
        "rank_correlation": "rank_correlation",
    }
    return {
        f"{name}_{which}": math.nan if figures is None else getattr(figures, field)
        for field, name in names.items()
    }
