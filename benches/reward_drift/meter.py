"""Measures every method's models by the same code."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from reward_drift.task import Point, Task

if TYPE_CHECKING:
    from quark.generation.base import Generator
    from quark.models.batch import TrainingBatch
    from quark.models.causal import CompletionRows
    from quark.models.policy import Policy
    from quark.types import Completion, Prompt


def peak_mib() -> float:
    """Of this process."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Meter:
    """Measures models on the held-out prompts of a configuration, all in the same way."""

    def __init__(self, task: Task, overrides: Sequence[str]) -> None:
        import torch

        from quark.config.load import load_config
        from quark.training import factories
        from quark.training.processes.devices import make_autocast

        self.task = task
        self.config = load_config("demo", tuple(overrides)).config
        self.device = torch.device("cpu")
        self.policy = factories.untrained_policy(self.config, self.device)
        self.reference = factories.frozen_reference(self.config, self.policy, self.device)
        self.autocast = make_autocast(self.config.run.precision, self.device)
        self.rewards = factories.make_rewards(self.config)
        self.prompts = factories.prompts_of(self.config)

    def points(
        self,
        policy: Policy,
        samples: int,
        cpu_seconds: float,
        *,
        guidance: Sequence[float] = (0.0,),
        is_conditioned: bool = True,
    ) -> Iterator[Point]:
        """What ``policy`` does under its best token, or without a token."""
        from quark.generation.transformers_generator import TransformersGenerator
        from quark.training.factories import make_evaluator

        peak = peak_mib()
        for strength in guidance:
            sampling = self.config.sampling.model_copy(update={"guidance": strength})
            config = self.config.model_copy(update={"sampling": sampling})
            evaluator = make_evaluator(
                config, self.prompts.evaluation, self.reference, self.rewards.reward, {}
            )
            generator: Generator = TransformersGenerator(
                policy, policy.tokenizer, policy.reward_tokens, sampling, self.device
            )
            if not is_conditioned:
                generator = Unconditioned(generator)
            with self.autocast():
                found = evaluator.evaluate(
                    generator, policy, quantile=policy.reward_tokens.num_quantiles - 1
                ).metrics
            yield Point(
                method=self.task.contender.method,
                settings=" ".join(self.task.contender.settings),
                seed=self.task.seed,
                samples=samples,
                guidance=strength,
                reward=found["reward_mean"],
                kl_per_completion=found["kl_sampled_per_completion"],
                kl_per_token=found["kl_sampled_to_reference"],
                distinct_2=found["distinct_2"],
                length=found["completion_length_mean"],
                perplexity=found["perplexity_reference"],
                cpu_seconds=cpu_seconds,
                peak_mib=peak,
            )

    def without_token(self, model: Any) -> Policy:  # noqa: ANN401 - a transformers model
        """A model that knows no reward token, as a policy."""
        from quark.models.policy import Policy

        class Plain(Policy):
            def completion_rows(self, batch: TrainingBatch) -> CompletionRows:
                return self.causal.run(batch.reference_inputs())

        return Plain(model, self.policy.tokenizer, self.policy.reward_tokens)


class Unconditioned:
    """A generator that gives no token whatever it is asked for."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        quantile: int | None,  # noqa: ARG002 - that is the point
        seed: int,
    ) -> list[Completion]:
        return self._generator.generate(prompts, quantile=None, seed=seed)
