"""The last phase of a round: the policy is measured on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from quark.evaluation.config import EvaluationConfig
from quark.evaluation.evaluator import Evaluation, Evaluator
from quark.generation.base import Generator
from quark.models.policy import Policy
from quark.training.loop.alerts import ControlGap
from quark.training.loop.journal import Journal
from quark.training.position import Answer, Baseline
from quark.training.processes.data_parallel import DataParallelEvaluator
from quark.training.processes.memory import memory_needed_for
from quark.types import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluating:
    """The held-out prompts and what measures on them."""

    evaluator: Evaluator | DataParallelEvaluator
    original: Generator
    """Samples from p0."""
    policy: Generator
    """Samples from the policy."""
    model: Policy
    """Whose likelihoods are measured."""
    autocast: Callable[[], AbstractContextManager[object]]
    section: EvaluationConfig
    num_quantiles: int
    journal: Journal

    def baseline(self) -> Baseline:
        """Figures of the original model without a token, with the answers that the end compares."""
        evaluation = self._evaluate(self.original, None)
        self._write(evaluation)
        return Baseline(
            metrics=dict(evaluation.metrics),
            judges=dict(evaluation.judges),
            answers=tuple(
                Answer(
                    prompt=completion.prompt.text,
                    completion=completion.text,
                    reward=reward if math.isfinite(reward) else None,
                )
                for completion, reward in self.shown(evaluation)
            ),
        )

    def best(self, *, is_logged: bool = False) -> Evaluation:
        """Figures under the best token; ``is_logged`` where the log has their row already."""
        evaluation = self._evaluate(self.policy, self.num_quantiles - 1)
        if not is_logged:
            self._write(evaluation)
        return evaluation

    def quantile(self, quantile: int) -> Evaluation:
        """Figures under the token of ``quantile``."""
        evaluation = self._evaluate(self.policy, quantile)
        self._write(evaluation)
        return evaluation

    def control_gap(self, best: Evaluation | None, *, is_last: bool) -> ControlGap | None:
        """The best token's reward over the lowest's, where it is to be measured after this round."""
        is_due = self.section.control_gap and not (is_last and self.section.control_curve)
        if best is None or not is_due or self.num_quantiles == 1:
            return None
        return ControlGap.between(best.rewards, self.quantile(0).rewards)

    def shown(self, evaluation: Evaluation) -> list[tuple[Completion, float]]:
        """One answer to each of the first prompts, with its reward."""
        indices = range(0, len(evaluation.completions), self.section.completions_per_prompt)
        return [
            (evaluation.completions[i], float(evaluation.rewards[i]))
            for i in indices[: self.section.show_prompts]
        ]

    def _evaluate(self, generator: Generator, quantile: int | None) -> Evaluation:
        self.journal.progress("evaluating")
        with (
            memory_needed_for("evaluating", setting="sampling.batch_size"),
            self.autocast(),
        ):
            evaluation = self.evaluator.evaluate(generator, self.model, quantile=quantile)
        for failure in evaluation.failures:
            self.journal.warn(f"round {self.journal.round}: {failure}")
        return evaluation

    def _write(self, evaluation: Evaluation) -> None:
        self.journal.write(
            "evaluation",
            quantile=evaluation.quantile,
            **evaluation.metrics,
            judges=evaluation.judges,
        )
