"""The loaded inputs of a run: its configuration, its process group, and the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from quark.config.load import LoadedConfig
from quark.config.schema import RunConfig
from quark.data.prompts import PromptSet
from quark.models.check.kept import checked
from quark.models.check.results import ModelCheck
from quark.models.policy import Policy
from quark.pool.columns import REWARD_COLUMN
from quark.reference.base import ReferencePolicy
from quark.rewards.base import RewardFunction
from quark.rewards.build import is_same_scorer, reward_provenance
from quark.run_directory import RunDirectory
from quark.run_identity import RunIdentity
from quark.training.events import TrainingListener
from quark.training.factories import (
    Rewards,
    check_fields,
    make_reference,
    make_rewards,
    prompts_of,
    untrained_policy,
    use_threads,
)
from quark.training.loop.draws import check_scope
from quark.training.processes.devices import autocast_dtype, choose_device, make_autocast
from quark.training.processes.process_group import ProcessGroup
from quark.training.processes.weights import ReplicatedWeights, ShardedWeights, Weights
from quark.training.state.entry import check_rewards, clear
from quark.training.state.exactness import make_fingerprint

LARGE_MODEL = 50_000_000
"""With at least this many parameters, a learning rate above ``LARGE_RATE`` gets a warning."""
LARGE_RATE = 2e-4
BUILT_IN_REWARDS = frozenset({"sentiment", "toxicity", "vader", "diversity", "length", "regex"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """A run with loaded models, before its pool is open."""

    config: RunConfig
    directory: RunDirectory
    identity: RunIdentity
    processes: ProcessGroup
    listener: TrainingListener
    device: torch.device
    policy: Policy
    weights: Weights
    reference: ReferencePolicy
    prompts: PromptSet
    rewards: Rewards
    fingerprint: Mapping[str, str]
    """Settings that must be equal when the run is resumed."""

    @property
    def run_id(self) -> str:
        """The id in the run's ``run.json``."""
        return self.identity.run_id

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[object]]:
        """The context for forward passes."""
        return make_autocast(self.config.run.precision, self.device)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """None without autocast."""
        return autocast_dtype(self.config.run.precision, self.device)


def load_context(
    loaded: LoadedConfig,
    run: RunDirectory,
    identity: RunIdentity,
    *,
    processes: ProcessGroup,
    listener: TrainingListener,
    fresh: bool,
    reward: RewardFunction | None = None,
) -> RunContext:
    """Load the inputs of a run.

    Args:
        loaded: the configuration.
        run: the run directory, after ``enter``.
        identity: the identity that ``enter`` returned.
        processes: the process group. All of its processes call this.
        listener: receives warnings and notes.
        fresh: delete the existing run once everything else has been loaded.
        reward: the object that replaces ``reward.name``, if a call passed one.

    Raises:
        ConfigError: a setting does not fit, or other rewards scored the pool.
        ModelError, DataError, RewardError: a model, the prompts or a reward cannot be loaded.
    """
    config = loaded.config
    device = processes.own_device(choose_device(config.run.device))
    use_threads(config)
    check_scope(config)
    rewards = rewards_of(config, processes, reward)
    _say_reward(config, rewards.reward, listener)
    _warn_of_own_judges(rewards, listener)
    scoring = {REWARD_COLUMN: rewards.reward, **rewards.extra_columns}
    scored_by = processes.from_main_process(
        lambda: check_rewards(run, config, scoring, identity, is_new=fresh)
    )
    identity = replace(identity, scored_by=scored_by, reward_sha256=None)
    policy = untrained_policy(config, device)
    _warn_of_coarse_steps(config, listener, has_adapter=policy.adapter is not None)
    _warn_of_large_steps(config, listener, policy)
    found = processes.from_main_process(lambda: checked(config.model, policy).to_json())
    check = ModelCheck.of_json(found)
    check.require(config.model.name)
    for note in check.notes:
        listener.on_message(f"{config.model.name}: {note}", level="warning")
    prompts = prompts_of(config)
    processes.from_main_process(
        lambda: check_fields(rewards, train=prompts.train, evaluation=prompts.evaluation)
    )
    for note in prompts.notes:
        listener.on_message(note, level="warning")
    if fresh:
        # Only now: a failed start must not delete the existing run.
        processes.from_main_process(lambda: clear(run, loaded, identity))
    fingerprint = make_fingerprint(device, processes, policy)
    weights = weights_of(policy, config, processes, device)
    return RunContext(
        config=config,
        directory=run,
        identity=identity,
        processes=processes,
        listener=listener,
        device=device,
        policy=policy,
        weights=weights,
        reference=weights.distribute(
            make_reference(config, policy, device, may_share=not processes.is_sharded)
        ),
        prompts=prompts,
        rewards=rewards,
        fingerprint=fingerprint,
    )


def weights_of(
    policy: Policy, config: RunConfig, processes: ProcessGroup, device: torch.device
) -> Weights:
    """The policy's weights, replicated or sharded as configured."""
    if not processes.is_sharded:
        return ReplicatedWeights(policy, processes)
    dtype = autocast_dtype(config.run.precision, device)
    return ShardedWeights(policy, processes, autocast_dtype=dtype)


def rewards_of(
    config: RunConfig, processes: ProcessGroup, given: RewardFunction | None = None
) -> Rewards:
    """The configured scorers in the process that scores, and placeholders in the others.

    Raises:
        RewardError: one cannot be loaded.
        ConfigError: a setting does not fit.
    """
    if processes.is_main_process:
        return make_rewards(config, given)
    return Rewards(reward=_Unasked(config.reward.name), judges={}, extra_columns={})


class _Unasked:
    """Placeholder for the reward in a process that does not score."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, **_texts: Sequence[str]) -> Sequence[float | None]:
        raise AssertionError("only process 0 asks rewards")


def _warn_of_coarse_steps(
    config: RunConfig, listener: TrainingListener, *, has_adapter: bool
) -> None:
    if config.model.dtype != "float32" and not has_adapter:
        listener.on_message(
            f"model.dtype = {config.model.dtype}: steps below about a 500th of a weight are rounded away, and the "
            'optimizer\'s moments are as coarse. Leave it at float32 (run.precision = "bfloat16" computes in '
            "bfloat16 all the same), or train adapters (model.lora.rank)",
            level="warning",
        )


def _warn_of_large_steps(config: RunConfig, listener: TrainingListener, policy: Policy) -> None:
    rate, size = config.optimizer.learning_rate, sum(p.numel() for p in policy.model.parameters())
    if policy.adapter is None and size >= LARGE_MODEL and rate > LARGE_RATE:
        listener.on_message(
            f"optimizer.learning_rate = {rate:g} suits models of a few million parameters, such as the demo's. This "
            f"one has {size / 1e6:,.0f} million: 1e-5 to 5e-5 is usual",
            level="warning",
        )


def _warn_of_own_judges(rewards: Rewards, listener: TrainingListener) -> None:
    """Warn about a judge that is the trained reward, which cannot show over-optimization."""
    for name, judge in rewards.judges.items():
        if is_same_scorer(judge, rewards.reward):
            listener.on_message(
                f"the judge {name} is the scorer that is trained on, so it says nothing about over-optimization: "
                "name another one in evaluation.judges",
                level="warning",
            )


def _say_reward(config: RunConfig, reward: RewardFunction, listener: TrainingListener) -> None:
    """Name the code, files or server of the user that score."""
    if config.reward.name in BUILT_IN_REWARDS:
        return
    details = {k: v for k, v in reward_provenance(reward).items() if k not in ("name", "files")}
    if details:
        listener.on_message(
            f"reward {reward.name}: "
            + ", ".join(f"{key} {value}" for key, value in details.items())
        )
