"""Tries the start of a run without writing anything."""

from __future__ import annotations

from dataclasses import dataclass

from quark.config.load import LoadedConfig
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.check.kept import checked
from quark.rewards.scoring import score
from quark.training.events import Progress, TrainingListener
from quark.training.factories import (
    check_fields,
    make_reference,
    make_rewards,
    prompts_of,
    untrained_policy,
    use_threads,
)
from quark.training.loop.draws import check_scope
from quark.training.preflight import preflight
from quark.training.processes.devices import choose_device, make_autocast
from quark.training.seeds import derive_seed
from quark.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedPrompt:
    """A prompt as the policy sees it, the original model's completion, and its score."""

    text: str
    """Begins with the best reward token."""
    token_ids: tuple[int, ...]
    completion: str
    reward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """The start of a run."""

    device: str
    num_parameters: int
    num_train_prompts: int
    num_evaluation_prompts: int
    notes: tuple[str, ...]
    prompts: tuple[RenderedPrompt, ...]


def dry_run(loaded: LoadedConfig, *, listener: TrainingListener) -> DryRun:
    """Load model, tokenizer and reward, and complete and score three prompts. Nothing is written."""
    config = loaded.config
    preflight(config)
    listener.on_progress(Progress(phase="loading", round=0, done=0, total=1))
    device = choose_device(config.run.device)
    check_scope(config)
    use_threads(config)
    rewards = make_rewards(config)
    policy = untrained_policy(config, device)
    check = checked(config.model, policy)
    check.require(config.model.name)
    original = make_reference(config, policy, device).causal
    prompts = prompts_of(config)
    check_fields(rewards, train=prompts.train, evaluation=prompts.evaluation)
    shown: list[Prompt] = list(prompts.train[:3])
    generator = TransformersGenerator(
        original, policy.tokenizer, policy.reward_tokens, config.sampling, device
    )
    with make_autocast(config.run.precision, device)():
        completions = generator.generate(
            shown, quantile=None, seed=derive_seed(config.run.seed, "dry run")
        )
    outcome = score(
        rewards.reward,
        [c.prompt.text for c in completions],
        [c.text for c in completions],
        on_error=config.reward.on_error,
        retries=config.reward.retries or 0,
        rows=[c.prompt.metadata for c in completions],
    )
    tokens = policy.reward_tokens
    best, best_ids = (tokens.texts[-1], (tokens.best,)) if tokens.are_placed else ("", ())
    return DryRun(
        device=str(device),
        num_parameters=sum(p.numel() for p in policy.model.parameters()),
        num_train_prompts=len(prompts.train),
        num_evaluation_prompts=len(prompts.evaluation),
        notes=(
            *(f"{config.model.name}: {note}" for note in check.notes),
            *prompts.notes,
            *outcome.messages,
        ),
        prompts=tuple(
            RenderedPrompt(
                text=best + completion.prompt.text,
                token_ids=(*best_ids, *completion.prompt.token_ids),
                completion=completion.text,
                reward=float(value),
            )
            for completion, value in zip(completions, outcome.scores, strict=True)
        ),
    )
