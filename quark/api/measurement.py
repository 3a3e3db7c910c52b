"""Measures a trained model as its run did; shared by `quark evaluate` and `quark frontier`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
import torch

from quark.api.trained_model import TrainedModel, overridden
from quark.api.trust import check_reach, may_read_prompts
from quark.config.schema import RunConfig
from quark.errors import ConfigError, RewardError
from quark.evaluation.conditioning import Conditioning, measure_conditioning
from quark.evaluation.evaluator import Evaluation
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.policy import Policy
from quark.reference.base import ReferencePolicy
from quark.rewards.base import RewardFunction
from quark.run_directory import RunDirectory
from quark.training.factories import (
    Rewards,
    check_fields,
    frozen_reference,
    held_out_sampling,
    make_evaluator,
    make_reference,
    make_rewards,
    prompts_of,
    untrained_policy,
    use_threads,
)
from quark.training.processes.devices import make_autocast
from quark.training.state.held_out import are_those_of, read_held_out
from quark.types import Prompt


class Tell(Protocol):
    """Shows a line to the user; its text may come from a reward or a file."""

    def __call__(self, text: str, *, level: Literal["info", "warning"] = "info") -> object:
        """Show ``text``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A policy, the original model, held-out prompts and scorers, loaded once for any number of evaluations."""

    config: RunConfig
    policy: Policy
    reference: ReferencePolicy
    prompts: Sequence[Prompt]
    rewards: Rewards
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    tell: Tell

    @classmethod
    def of(
        cls,
        source: TrainedModel,
        config: RunConfig,
        prompts: Path | Sequence[Prompt] | None,
        *,
        tell: Tell,
        reward: RewardFunction | None = None,
    ) -> Self:
        """Load what ``config`` says, with these prompts, or those that the run held out.

        ``reward`` is the object that ``reward.name`` stands for, where it was given in Python.
        """
        use_threads(config)
        policy = source.policy or untrained_policy(config, source.device)
        is_own = config.model == source.config.model
        make = make_reference if is_own else frozen_reference
        reference = make(config, policy, source.device)
        if isinstance(prompts, Path):
            chosen = tuple(source.prompts_of(prompts))
        elif prompts is not None:
            chosen = tuple(prompts)
        else:
            chosen = held_out_prompts(source, config, tell)
        if source.is_run and is_own and config.model.lora.rank and policy.adapter is None:
            tell(
                "no checkpoint has this model's adapters: measuring it with them merged, which rounds"
            )
        rewards = make_rewards(config, reward, explores=False)
        check_fields(rewards, evaluation=chosen)
        return cls(
            config=config,
            policy=policy,
            reference=reference,
            prompts=chosen,
            rewards=rewards,
            device=source.device,
            autocast=make_autocast(config.run.precision, source.device),
            tell=tell,
        )

    def evaluate(self, guidance: float, quantile: int | None) -> Evaluation:
        """The figures under the token of ``quantile``, or of the original model if it is None."""
        sampling = self.config.sampling.model_copy(update={"guidance": guidance})
        config = self.config.model_copy(update={"sampling": sampling})
        name = "the original model" if quantile is None else f"quantile {quantile}"
        is_by_critic = self.config.sampling.guide == "critic"
        if guidance and (quantile or (is_by_critic and quantile is not None)):
            name += f" with guidance {guidance:.2f}"
        self.tell(f"evaluating {name} on {len(self.prompts)} prompts")
        evaluator = make_evaluator(
            config, self.prompts, self.reference, self.rewards.reward, self.rewards.judges
        )
        generator = TransformersGenerator(
            self.reference.causal if quantile is None else self.policy,
            self.policy.tokenizer,
            self.policy.reward_tokens,
            held_out_sampling(config),
            self.device,
        )
        with self.autocast():
            evaluation = evaluator.evaluate(generator, self.policy, quantile=quantile)
        for failure in evaluation.failures:
            self.tell(failure, level="warning")
        return evaluation

    def conditioning(self, evaluations: Sequence[Evaluation]) -> Conditioning | None:
        """Whether the model listens to its tokens; None if not every token was evaluated, or there is only one.

        None also where a critic guides, which tells the tokens apart whether the model listens to them or not.
        """
        sampling = self.config.sampling
        if sampling.guide == "critic" and sampling.guidance > 0.0:
            return None
        if not self.policy.reward_tokens.are_placed:
            return None
        tokens = range(self.policy.reward_tokens.num_quantiles)
        found = {e.quantile: e for e in evaluations}
        if len(tokens) < 2 or not all(token in found for token in tokens):
            return None
        with self.autocast():
            return measure_conditioning(
                self.policy,
                [found[token] for token in tokens],
                per_prompt=self.config.evaluation.completions_per_prompt,
                batch_size=self.config.sampling.batch_size,
            )


def check_run(
    source: TrainedModel,
    config: RunConfig,
    *,
    prompts: object,
    rewards: Sequence[str] | None,
    reference: str | None,
    allow: Collection[str] | None,
) -> None:
    """Check that the user allows what the configuration of a run reaches, but for what options of the command name.

    Raises:
        ConfigError: the user has not.
    """
    if not source.is_run:
        return
    named = [
        *(("reward.name", name) for name in (rewards or ())[:1]),
        *(("evaluation.judges", name) for name in (rewards or ())[1:]),
        *(() if reference is None else [("model.name", reference)]),
    ]
    sections = ("model", "reward", "evaluation", "pool", *prompt_sections(source, prompts))
    check_reach(config, Path(source.name), sections=sections, named=named, allow=allow)


def prompt_sections(source: TrainedModel, prompts: object) -> list[str]:
    """The settings that name the prompts, if they are needed: a run records its held-out prompts."""
    is_needed = prompts is None and not RunDirectory(Path(source.name)).held_out.exists()
    return ["prompts"] if is_needed else []


def configured(
    source: TrainedModel,
    *,
    rewards: tuple[str, ...] | list[str],
    reference: str | None,
    num: int | None,
    seed: int | None,
) -> RunConfig:
    """The source's configuration with the options of the command line."""
    config = source.config
    if source.policy is not None and not source.is_run and reference is None:
        raise ConfigError(
            f"{source.name} does not say which model it was trained from: give --reference"
        )
    if source.policy is None:
        reference = source.name
    values: dict[str, dict[str, object]] = {"evaluation": {}, "reward": {}, "model": {}, "run": {}}
    if rewards:
        values["reward"]["name"] = rewards[0]
        values["reward"]["members"] = ()
        values["evaluation"]["judges"] = tuple(rewards[1:])
    if num is not None:
        values["evaluation"]["completions_per_prompt"] = num
    if reference is not None:
        values["model"]["name"] = reference
    if seed is not None:
        values["run"]["seed"] = seed
    return overridden(config, values)


def held_out_prompts(source: TrainedModel, config: RunConfig, tell: Tell) -> tuple[Prompt, ...]:
    """The prompts that a run held out, even if its prompt file has changed since.

    Without a run: the prompts of the default file.
    """
    if not source.is_run:
        # The run's seed splits, and --seed only samples.
        return prompts_of(source.config.model_copy(update={"model": config.model})).evaluation
    run = RunDirectory(Path(source.name))
    policy = source.policy
    recorded = read_held_out(
        run, vocab_size=None if policy is None else policy.reward_tokens.base_vocab_size
    )
    if recorded is not None:
        # A file that the user has not allowed is not looked at: the record may be a stranger's.
        if may_read_prompts(config, run.path, recorded.source) and recorded.source_has_changed():
            tell(
                f"{recorded.source} has changed since the run began: measuring on the prompts that the run held out",
                level="warning",
            )
        return recorded.prompts
    found = prompts_of(source.config).evaluation
    tell(
        "the run does not record its held-out prompts: its prompt file is split again by its seed",
        level="warning",
    )
    if not are_those_of(run, found):
        tell(
            "these are other prompts than it held out, so some may have been trained on: see --prompts",
            level="warning",
        )
    return found


def require_scores(evaluations: list[Evaluation], reward: str) -> None:
    """Raise RewardError if no completion got a score."""
    if all(np.isnan(evaluation.rewards).all() for evaluation in evaluations):
        num_completions = sum(len(evaluation.completions) for evaluation in evaluations)
        reasons = next((e.failures[0] for e in evaluations if e.failures), "every score is NaN")
        raise RewardError(
            f"the reward {reward} scored none of {num_completions} completions: {reasons}. "
            f"`quark reward check {reward}` tries it alone"
        )
