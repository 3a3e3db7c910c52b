"""Builds parts from a configuration alone. Training, a dry run and `quark evaluate` share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quark.config.schema import RunConfig
from quark.data.prompts import PromptSet, load_prompts
from quark.errors import CheckpointError, ConfigError, ModelError
from quark.evaluation.evaluator import Evaluator
from quark.generation.base import SamplingConfig
from quark.models.loading import (
    load_context_length,
    load_policy,
    load_saved_policy,
    load_tokenizer,
    weights_dtype,
)
from quark.models.policy import Policy
from quark.pool.columns import GOLD_COLUMN, member_column
from quark.reference.base import ReferencePolicy
from quark.reference.build import ReferenceName, build_reference, reference_name
from quark.rewards.base import RewardFunction
from quark.rewards.build import build_judges, build_reward
from quark.rewards.ensemble import EnsembleReward
from quark.rewards.fields import fields_asked, require_fields
from quark.run_directory import RunDirectory
from quark.training.loop.critic_hook import KeptCritic
from quark.training.loop.hooks import WeightHooks
from quark.training.processes.devices import autocast_dtype
from quark.training.seeds import derive_seed
from quark.training.state.checkpoint import Checkpoint, Checkpoints
from quark.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """The scorers of a run."""

    reward: RewardFunction
    """The trained reward."""
    judges: Mapping[str, RewardFunction]
    """Further rewards that measure held-out completions, by name."""
    extra_columns: Mapping[str, RewardFunction]
    """Further rewards that score the pool's samples, by score column."""

    @property
    def read_fields(self) -> bool:
        """Whether the pool's scores depend on other fields of the prompts' rows."""
        scorers = (self.reward, *self.extra_columns.values())
        return any(fields_asked(scorer).are_any for scorer in scorers)


def make_rewards(
    config: RunConfig, given: RewardFunction | None = None, *, explores: bool = True
) -> Rewards:
    """The configured scorers.

    Args:
        config: the configuration that names them.
        given: the object that replaces ``reward.name``, if a call passed one.
        explores: whether the pool's samples will be scored. A measurement leaves out their further scorers, so that
            their code does not run.

    Raises:
        RewardError: one cannot be loaded.
        ConfigError: a setting does not fit.
    """
    reward = build_reward(config.reward, given)
    members: dict[str, RewardFunction] = {}
    if isinstance(reward, EnsembleReward):
        members = {member_column(i + 1): member for i, member in enumerate(reward.members)}
    gold = {} if config.pool.gold is None else {GOLD_COLUMN: config.pool.gold}
    columns = config.further_columns if explores else gold
    others = {column: name for column, name in columns.items() if column not in members}
    built = build_judges(tuple(others.values()), config.reward)
    further = {column: built[name] for column, name in others.items()}
    return Rewards(
        reward=reward,
        judges={
            **build_judges(config.evaluation.judges, config.reward),
            **{column: further[column] for column in gold},
        },
        extra_columns=members | further if explores else {},
    )


def check_fields(
    rewards: Rewards, *, train: Sequence[Prompt] = (), evaluation: Sequence[Prompt] = ()
) -> None:
    """Check that the prompts have the fields that the scorers of their completions require.

    Raises:
        DataError: one has not.
    """
    rows = [[(p.place, p.metadata) for p in prompts] for prompts in (train, evaluation)]
    for reward in (rewards.reward, *rewards.extra_columns.values()):
        require_fields(reward, rows[0])
    for reward in (rewards.reward, *rewards.judges.values()):
        require_fields(reward, rows[1])


def use_threads(config: RunConfig) -> None:
    """Set the configured number of CPU threads in torch. The number affects rounding."""
    if config.run.num_threads is not None:
        torch.set_num_threads(config.run.num_threads)


def untrained_policy(config: RunConfig, device: torch.device) -> Policy:
    """The untrained policy in eval mode, because dropout would add noise to the KL.

    Raises:
        ModelError: the model cannot be found, or cannot take reward tokens or adapters.
    """
    policy = load_policy(
        config.model,
        num_quantiles=config.pool.num_quantiles,
        seed=derive_seed(config.run.seed, "reward tokens"),
        device=device,
    )
    policy.model.eval()
    if not config.trains_weights:
        policy.model.requires_grad_(False)
    return policy


def trained_policy(
    config: RunConfig, run: RunDirectory, device: torch.device, *, is_merged: bool = False
) -> Policy:
    """The finished model of a run, with the same results to the bit as in the run if possible.

    The saved model has its adapters merged into the weights, which rounds them. The newest checkpoint is used instead
    if it has the same weights.

    Args:
        config: the configuration of the run. The original model that it names is loaded to add adapters.
        run: the run directory.
        device: the device of the policy.
        is_merged: use the saved model as it is.

    Raises:
        ModelError: the run has no model that can be loaded.
    """
    saved = load_saved_policy(run.model, device=device, dtype=weights_dtype(config.model))
    if is_merged or not config.model.lora.rank:
        return saved
    try:
        checkpoint, _ = Checkpoints(run.checkpoints, keep_last=2).newest()
        if checkpoint is None:
            return saved
        policy = untrained_policy(config, device)
        checkpoint.load_model(policy.model)
    except (ModelError, CheckpointError):
        return saved
    policy.critics.critic = saved.critics.critic
    return policy if _merges_to(policy, saved) else saved


def checkpointed_policy(
    config: RunConfig, run: RunDirectory, device: torch.device, which: str
) -> tuple[Policy, int]:
    """The policy of a run at a checkpoint, and the step of that checkpoint.

    Args:
        config: the configuration of the run.
        run: the run directory.
        device: the device of the policy.
        which: ``best``, ``last`` or a step.

    Raises:
        CheckpointError: there is no such checkpoint.
        ModelError: the original model cannot be loaded.
    """
    checkpoint = Checkpoints(run.own(run.checkpoints), keep_last=2).named(which)
    policy = untrained_policy(config, device)
    checkpoint.load_model(policy.model)
    take_critic(checkpoint, policy)
    return policy, checkpoint.step


def take_critic(checkpoint: Checkpoint, policy: Policy) -> None:
    """Add the critic of a checkpoint to ``policy``, if there is one.

    Raises:
        CheckpointError: it is damaged.
    """
    width = policy.reward_tokens.base_vocab_size
    hooks = WeightHooks(KeptCritic(policy.critics, base_vocab_size=width))
    try:
        hooks.load(checkpoint.state.hooks, checkpoint.hook_tensors())
    except (KeyError, ValueError) as err:
        raise CheckpointError(f"{checkpoint.path}: its critic cannot be read ({err})") from err


def _merges_to(policy: Policy, saved: Policy) -> bool:
    """Whether ``saved`` is ``policy`` with its adapters merged."""
    assert policy.adapter is not None
    expected = saved.model.state_dict()
    with policy.adapter.merged():
        found = policy.model.state_dict()
        return found.keys() == expected.keys() and all(
            torch.equal(value.cpu(), expected[name].cpu()) for name, value in found.items()
        )


def make_reference(
    config: RunConfig, policy: Policy, device: torch.device, *, may_share: bool = True
) -> ReferencePolicy:
    """The original model: the policy itself if nothing trains it, below its adapters, or a separate copy.

    Args:
        config: names it.
        policy: is compared with it.
        device: of a copy.
        may_share: whether it may be the policy itself. Weights that processes share are laid out once.

    Raises:
        ModelError: it cannot be found.
    """
    name = reference_name(policy)
    return _reference(
        "frozen" if name == "policy" and not may_share else name, config, policy, device
    )


def frozen_reference(config: RunConfig, policy: Policy, device: torch.device) -> ReferencePolicy:
    """A copy of the configured model, to compare ``policy`` with.

    Raises:
        ModelError: it cannot be found.
    """
    return _reference("frozen", config, policy, device)


def _reference(
    name: ReferenceName, config: RunConfig, policy: Policy, device: torch.device
) -> ReferencePolicy:
    dtype = autocast_dtype(config.run.precision, device)
    return build_reference(name, config.model, policy, device, autocast_dtype=dtype)


def prompts_of(config: RunConfig) -> PromptSet:
    """The prompts, encoded by the original tokenizer: the text of a reward token in a prompt stays text.

    Raises:
        ConfigError: the model's context has no room for a prompt.
        DataError, FileNotFoundError, ModelError: errors of the parts.
    """
    return load_prompts(
        config.prompts,
        load_tokenizer(config.model),
        seed=derive_seed(config.run.seed, "split"),
        room=_room(config),
    )


def _room(config: RunConfig) -> int | None:
    """Number of prompt tokens that fit into the model's context, beside the reward token and the completion."""
    context = load_context_length(config.model)
    if context is None:
        return None
    # The last sampled token is never an input, which leaves a position for the reward token.
    room = context - config.sampling.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"sampling.max_new_tokens = {config.sampling.max_new_tokens} leaves no room for a prompt in the "
            f"{context} tokens that {config.model.name} sees: lower it"
        )
    return room


def held_out_sampling(config: RunConfig) -> SamplingConfig:
    """The sampling settings for held-out prompts."""
    section = config.evaluation
    changed = {"top_p": section.top_p, "temperature": section.temperature}
    return config.sampling.model_copy(
        update={name: value for name, value in changed.items() if value is not None}
    )


def make_evaluator(
    config: RunConfig,
    prompts: Sequence[Prompt],
    reference: ReferencePolicy,
    reward: RewardFunction,
    judges: Mapping[str, RewardFunction],
) -> Evaluator:
    """An evaluator that measures models on ``prompts`` as the run does."""
    return Evaluator(
        prompts=prompts,
        reference=reference,
        reward=reward,
        judges=judges,
        completions_per_prompt=config.evaluation.completions_per_prompt,
        sampling=held_out_sampling(config),
        seed=derive_seed(config.run.seed, "evaluate"),
        retries=config.reward.retries or 0,
    )
