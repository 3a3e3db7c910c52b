"""Configuration to objects: the only place that knows every class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import quark
from quark.config.load import LoadedConfig
from quark.config.schema import RunConfig
from quark.errors import (
    ConfigError,
)
from quark.generation.base import Generator, SamplingConfig
from quark.generation.completion_server import CompletionServer
from quark.generation.http_generator import HttpGenerator
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.policy import Policy
from quark.objectives.quark import QuarkObjective
from quark.pool.columns import REWARD_COLUMN, column_name
from quark.reference.base import ReferencePolicy
from quark.reference.row_files import RowFiles
from quark.rewards.base import RewardFunction
from quark.rewards.build import reward_provenance
from quark.run_directory import RunDirectory
from quark.run_identity import RunIdentity
from quark.training.events import Progress, Silence, TrainingListener
from quark.training.loop.cached_reference import CachedReference
from quark.training.loop.draws import check_scope
from quark.training.loop.exploration import REFERENCE_BLOCK, Explorer
from quark.training.loop.metrics import MetricLog, SilentLog
from quark.training.loop.trackers import make_trackers
from quark.training.loop.trainer import Trainer
from quark.training.parts import (
    Rewards,
    held_out_sampling,
    make_evaluator,
    make_reference,
    make_rewards,
    prompts_of,
    untrained_policy,
    use_threads,
)
from quark.training.preflight import preflight
from quark.training.processes.devices import autocast_dtype, choose_device, make_autocast
from quark.training.processes.distributed import Team
from quark.training.processes.sharding import ShardedWeights, WholeWeights
from quark.training.processes.shared import LeadGenerator, SharedEvaluator, SharedGenerator
from quark.training.state.checkpoint import Checkpoints, verify
from quark.training.state.entry import check_rewards, clear, enter, record
from quark.training.state.exactness import Exactness, make_fingerprint
from quark.training.state.published import PublishedWeights
from quark.training.state.resumption import find_checkpoint, open_shared_pool
from quark.types import Json

BUILT_IN_REWARDS = frozenset({"sentiment", "toxicity", "vader", "diversity", "length", "regex"})


def assemble(
    loaded: LoadedConfig,
    run_dir: Path | None,
    *,
    listener: TrainingListener,
    team: Team | None = None,
    fresh: bool = False,
    force: bool = False,
    require_exact: bool = False,
) -> Trainer:
    """A trainer for a new run, or for the rest of the run that ``run_dir`` holds.

    Args:
        loaded: the configuration.
        run_dir: None is ``runs/<name of the configuration's source>``.
        listener: is told what happens, in the lead alone.
        team: the processes that run it together, all of which call this; None is this one alone.
        fresh: start over; refuses where there is a run.
        force: with ``fresh``: delete that run first.
        require_exact: refuse to resume where the run would not end with the bytes of an uninterrupted one.

    Raises:
        RunDirectoryError: the directory is not a run of ours, or ``fresh`` met a run.
        PoolLockedError: another process runs it; nothing was changed.
        ConfigError: the configuration is not the one the run was made with.
        ModelError, DataError, RewardError, PoolError, CheckpointError: as the parts say.
    """
    config = loaded.config
    team = team or Team()
    if not team.is_lead:
        listener = Silence()
    _check_share(config, team)
    exactness = Exactness(require_exact, listener)
    exactness.check_device(choose_device(config.run.device))
    run = RunDirectory(run_dir if run_dir is not None else Path("runs") / loaded.name)

    def checked_and_entered() -> dict[str, Json]:
        preflight(config)
        return enter(run, loaded, listener, exactness, fresh=fresh, force=force).to_json()

    identity = RunIdentity.of_json(team.from_lead(checked_and_entered))
    listener.on_progress(Progress(phase="loading", round=0, done=0, total=1))
    device = team.place(choose_device(config.run.device))
    use_threads(config)
    autocast = make_autocast(config.run.precision, device)
    check_scope(config.pool)
    rewards = make_rewards(config) if team.is_lead else _unasked(config)
    if config.reward.name not in BUILT_IN_REWARDS:
        _say_reward(rewards.reward, listener)
    scoring = {REWARD_COLUMN: rewards.reward}
    scoring |= {column_name(name): reward for name, reward in rewards.extra.items()}
    scored_by = team.from_lead(lambda: check_rewards(run, config, scoring, identity, is_new=fresh))
    identity = replace(identity, scored_by=scored_by, reward_sha256=None)
    policy = untrained_policy(config, device)
    if config.model.dtype != "float32" and policy.adapter is None:
        listener.on_message(
            f"model.dtype = {config.model.dtype}: steps below about a 500th of a weight are rounded away, and the "
            'optimizer\'s moments are as coarse. Leave it at float32 (run.precision = "bfloat16" computes in '
            "bfloat16 all the same), or train adapters (model.lora.rank)",
            level="warning",
        )
    prompts = prompts_of(config)
    for note in prompts.notes:
        listener.on_message(note, level="warning")
    if fresh:
        # Not before: a start that fails leaves the run that is there.
        team.from_lead(lambda: clear(run, loaded, identity))
    fingerprint = make_fingerprint(device, team, policy)
    weights = WholeWeights(policy, team)
    if team.is_sharded:
        dtype = autocast_dtype(config.run.precision, device)
        weights = ShardedWeights(policy, team, autocast_dtype=dtype)
    serving = None
    if config.sampling.backend == "http":
        with weights.whole():
            serving = _serving(run, config, weights.alone, listener) if team.is_lead else None
    reference = weights.place(make_reference(config, policy, device))
    pool = open_shared_pool(team, run, config, policy, prompts, identity.run_id)
    try:
        if config.reference.cache == "hidden":
            reference = CachedReference(
                reference,
                files=RowFiles(run.reference_cache),
                pool=pool,
                run_id=identity.run_id,
                policy=policy,
                block_size=REFERENCE_BLOCK,
                autocast=autocast,
                autocast_dtype=autocast_dtype(config.run.precision, device),
                team=team,
            )
        checkpoints = Checkpoints(
            run.checkpoints,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
        )

        def find() -> str | None:
            found = find_checkpoint(
                run,
                checkpoints,
                fingerprint,
                listener,
                exactness,
                num_rounds=config.run.num_rounds,
            )
            # Not before: a start that is refused leaves the run as it was, and it may be another process's.
            record(run, loaded, identity)
            return found.path.name if found is not None else None

        name = team.from_lead(find)
        # Each process reads it for itself, and every byte is checked.
        resume_from = verify(run.checkpoints / name) if name is not None else None
        log: MetricLog | SilentLog = SilentLog()
        if team.is_lead:
            log = MetricLog(
                run.metrics,
                offset=resume_from.state.metrics_bytes if resume_from is not None else 0,
                trackers=make_trackers(
                    config.tracking.trackers,
                    run.path,
                    project=config.tracking.project,
                    run_id=identity.run_id,
                    config=config.model_dump(mode="json"),
                ),
            )
        if resume_from is None:
            log.write(
                "run",
                0,
                run_id=identity.run_id,
                quark_version=quark.__version__,
                device=str(device),
                versions=fingerprint,
            )
    except BaseException:
        pool.close()
        raise

    def generator(model: WholeWeights | ReferencePolicy, sampling: SamplingConfig) -> Generator:
        alone = model.alone if isinstance(model, WholeWeights) else model
        if config.sampling.backend == "http":
            served = None if serving is None else serving.generator(alone, policy, sampling, device)
            return LeadGenerator(served, team, model.whole)
        sampler = TransformersGenerator(
            alone.causal, policy.tokenizer, policy.reward_tokens, sampling, device
        )
        within = model.sampling if isinstance(model, WholeWeights) else model.whole
        return sampler if team.size == 1 else SharedGenerator(sampler, team, within)

    evaluator = make_evaluator(
        config, prompts.evaluation, reference, rewards.reward, rewards.judges
    )
    return Trainer(
        config=config,
        run=run,
        run_id=identity.run_id,
        policy=policy,
        reference=reference,
        explore_first=generator(reference, config.sampling),
        explore=generator(weights, config.sampling),
        evaluate_first=generator(reference, held_out_sampling(config)),
        evaluate=generator(weights, held_out_sampling(config)),
        explorer=Explorer(
            run_id=identity.run_id,
            seed=config.run.seed,
            prompts=prompts.train,
            pool=pool,
            reward=rewards.reward,
            extra_rewards={column_name(name): judge for name, judge in rewards.extra.items()},
            reward_config=config.reward,
            sampling=config.sampling,
            policy=policy,
            reference=reference,
            stores_text=config.pool.store_text,
            chunk_size=config.run.chunk_size,
            completions_per_prompt=config.run.completions_per_prompt,
            autocast=autocast,
            overlaps_scoring=config.overlaps_scoring,
            team=team,
        ),
        pool=pool,
        objective=QuarkObjective(config.objective),
        evaluator=evaluator if team.size == 1 else SharedEvaluator(evaluator, team, weights),
        checkpoints=checkpoints,
        log=log,
        listener=listener,
        autocast=autocast,
        team=team,
        weights=weights,
        resume_from=resume_from,
        fingerprint=fingerprint,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Serving:
    """The server that samples, and the weights that it is given."""

    server: CompletionServer
    weights: PublishedWeights

    def generator(
        self,
        model: Policy | ReferencePolicy,
        policy: Policy,
        sampling: SamplingConfig,
        device: torch.device,
    ) -> HttpGenerator:
        # Without a reward token, and before any training, the policy is the original model.
        is_policy = isinstance(model, Policy)
        return HttpGenerator(
            model.causal,
            policy.tokenizer,
            policy.reward_tokens,
            sampling,
            device,
            server=self.server,
            publish=self.weights.newest if is_policy else self.weights.initial,
            num_columns=policy.model.get_output_embeddings().weight.shape[0],
        )


def _serving(
    run: RunDirectory, config: RunConfig, policy: Policy, listener: TrainingListener
) -> _Serving:
    """The server, and ``policy`` as it is before training for it.

    Raises:
        ConfigError: the server could not answer as the model does.
    """
    if policy.num_leading_positions:
        raise ConfigError(
            'sampling.backend = "http" with a model that has absolute positions: a server counts them '
            "from 0, so set model.shift_positions = false"
        )
    return _Serving(
        server=CompletionServer(config.sampling.http, say=listener.on_message),
        weights=PublishedWeights(run.served, policy),
    )


class _Unasked:
    """Stands where a process that does not score has no reward."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, **_texts: Sequence[str]) -> Sequence[float | None]:
        raise AssertionError("only process 0 asks rewards")


def _unasked(config: RunConfig) -> Rewards:
    return Rewards(reward=_Unasked(config.reward.name), judges={}, extra={})


def _check_share(config: RunConfig, team: Team) -> None:
    if team.is_sharded and config.reference.cache != "off":
        raise ConfigError(
            f'reference.cache = "{config.reference.cache}" with run.parallel = "sharded": one process would need all '
            'weights of the original model whenever a sample is not in the cache. Set reference.cache = "off", or '
            'run.parallel = "data"'
        )
    if team.is_sharded and config.optimizer.settling_steps:
        raise ConfigError(
            "optimizer.settling_steps moves single rows of the embedding, which sharded weights divide among the "
            'processes: set it to 0, or run.parallel = "data"'
        )
    if config.optimizer.batch_size < team.size:
        raise ConfigError(
            f"optimizer.batch_size = {config.optimizer.batch_size} is less than one sample for each of "
            f"{team.size} processes"
        )


def _say_reward(reward: RewardFunction, listener: TrainingListener) -> None:
    """Name the code, files or server that score."""
    details = {k: v for k, v in reward_provenance(reward).items() if k not in ("name", "files")}
    if details:
        listener.on_message(
            f"reward {reward.name}: "
            + ", ".join(f"{key} {value}" for key, value in details.items())
        )
