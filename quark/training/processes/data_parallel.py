"""Data-parallel sampling and evaluation with the results of a single process.

Each process samples whole batches, the same ones that a single process would run. A completion and its
log-probability therefore have the same bits for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import numpy as np

from quark.evaluation.evaluator import Evaluation, Evaluator, Likelihoods
from quark.generation.base import Generator
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.policy import Policy
from quark.training.processes.process_group import ProcessGroup
from quark.training.processes.weights import Weights
from quark.types import Completion, FinishReason, Prompt

_GeneratorT = TypeVar("_GeneratorT", bound=Generator | None)


class _GroupGenerator(Generic[_GeneratorT]):
    """Samples together with the other processes of a group.

    Args:
        generator: the generator of this process.
        processes: the process group.
        gathered: the context in which the generator's model has its weights.
    """

    def __init__(
        self,
        generator: _GeneratorT,
        processes: ProcessGroup,
        gathered: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._generator = generator
        self._processes = processes
        self._gathered = gathered


class DataParallelGenerator(_GroupGenerator[TransformersGenerator]):
    """Deals the batches out to the processes. Each process gets all completions."""

    def generate(
        self, prompts: Sequence[Prompt], *, quantile: int | None, seed: int
    ) -> list[Completion]:
        """One completion per prompt, in order, the same in every process; see ``Generator``."""
        dealt = self._generator.batches(prompts)[self._processes.rank :: self._processes.size]
        rows = [row for batch in dealt for row in batch]
        with self._gathered():
            mine = self._generator.generate(prompts, quantile=quantile, seed=seed, rows=rows)
        shares = self._processes.gather([_plain(row, c) for row, c in zip(rows, mine, strict=True)])
        completions = {
            plain["row"]: _completion(plain, prompts, quantile, seed)
            for share in shares
            for plain in share
        }
        return [completions[row] for row in range(len(prompts))]


class MainProcessGenerator(_GroupGenerator[Generator | None]):
    """Samples in the main process, the only one with a generator. Each process gets all completions."""

    def generate(
        self, prompts: Sequence[Prompt], *, quantile: int | None, seed: int
    ) -> list[Completion]:
        """One completion per prompt, in order, the same in every process; see ``Generator``."""

        def sample() -> list[dict[str, Any]]:
            assert self._generator is not None, "only process 0 samples"
            completions = self._generator.generate(prompts, quantile=quantile, seed=seed)
            return [_plain(row, completion) for row, completion in enumerate(completions)]

        with self._gathered():
            plain = self._processes.from_main_process(sample)
        return [_completion(one, prompts, quantile, seed) for one in plain]


class DataParallelEvaluator:
    """An evaluator whose completions all processes sample. The main process computes the figures.

    Args:
        evaluator: the evaluator of this process. Only that of the main process calls rewards.
        processes: the process group.
        weights: the layout of the weights. If they are sharded, all processes take part in passes for KL and
            perplexity.
    """

    def __init__(self, evaluator: Evaluator, processes: ProcessGroup, weights: Weights) -> None:
        self._evaluator = evaluator
        self._processes = processes
        self._weights = weights

    def evaluate(self, generator: Generator, policy: Policy, *, quantile: int | None) -> Evaluation:
        """The same evaluation in every process; see ``Evaluator.evaluate``."""
        completions = self._evaluator.sample(generator, quantile=quantile)

        def likelihoods() -> Likelihoods:
            return self._evaluator.likelihoods(completions, policy, quantile=quantile)

        measured: Likelihoods | None = None
        if self._weights.is_sharded:
            with self._processes.exchange():
                measured = likelihoods()
            self._weights.release()

        def measure() -> dict[str, Any]:
            evaluation = self._evaluator.measure(
                completions, likelihoods() if measured is None else measured, quantile=quantile
            )
            return {
                "rewards": evaluation.rewards.tolist(),
                "metrics": dict(evaluation.metrics),
                "judges": dict(evaluation.judges),
                "judge_scores": {k: v.tolist() for k, v in evaluation.judge_scores.items()},
                "by_completion": {
                    k: v.tolist() for k, v in evaluation.likelihoods.by_completion.items()
                },
                "likelihoods": dict(evaluation.likelihoods.metrics),
                "failures": list(evaluation.failures),
            }

        figures = self._processes.from_main_process(measure)
        return Evaluation(
            quantile=quantile,
            rewards=np.array(figures["rewards"], dtype=np.float32),
            completions=completions,
            metrics=figures["metrics"],
            judges=figures["judges"],
            judge_scores={
                name: np.array(scores, dtype=np.float32)
                for name, scores in figures["judge_scores"].items()
            },
            likelihoods=Likelihoods(
                metrics=figures["likelihoods"],
                by_completion={
                    name: np.array(sums, dtype=np.float64)
                    for name, sums in figures["by_completion"].items()
                },
            ),
            failures=figures["failures"],
        )


def _plain(row: int, completion: Completion) -> dict[str, Any]:
    return {
        "row": row,
        "token_ids": completion.token_ids.tolist(),
        "text": completion.text,
        "finish_reason": int(completion.finish_reason),
        "logprob_policy": completion.logprob_policy,
        "logprob_sampled": completion.logprob_sampled,
    }


def _completion(
    plain: dict[str, Any], prompts: Sequence[Prompt], quantile: int | None, seed: int
) -> Completion:
    return Completion(
        prompt=prompts[plain["row"]],
        token_ids=np.array(plain["token_ids"], dtype=np.uint32),
        text=plain["text"],
        finish_reason=FinishReason(plain["finish_reason"]),
        reward_quantile=quantile,
        seed=seed,
        logprob_policy=plain["logprob_policy"],
        logprob_sampled=plain["logprob_sampled"],
    )
