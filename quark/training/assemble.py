"""Configuration to objects: the only place that knows every class."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import quark
from quark.config.load import LoadedConfig, load_config, to_toml
from quark.config.schema import RunConfig
from quark.data.prompts import PromptSet, load_prompts
from quark.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    PoolError,
    PoolLockedError,
    RunDirectoryError,
    TrainingError,
)
from quark.evaluation.evaluator import Evaluator
from quark.generation.base import Generator, SamplingConfig
from quark.generation.completion_server import CompletionServer
from quark.generation.http_generator import HttpGenerator
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.causal import CausalModel
from quark.models.loading import load_base_model, load_policy, load_tokenizer
from quark.models.lora import frozen_digest
from quark.models.policy import Policy
from quark.objectives.quark import QuarkObjective
from quark.pool.native import NativePool
from quark.reference.adapter_off import AdapterOffReference
from quark.reference.base import FrozenReference, ReferencePolicy
from quark.reference.row_files import RowFiles
from quark.rewards.base import RewardFunction
from quark.rewards.build import build_reward, reward_provenance
from quark.rewards.config import RewardConfig
from quark.rewards.scoring import score
from quark.run_directory import RunDirectory
from quark.training.cached_reference import CachedReference
from quark.training.checkpoint import Checkpoint, Checkpoints, verify
from quark.training.distributed import Team
from quark.training.draws import REWARD_COLUMN, check_condition
from quark.training.events import Progress, Silence, TrainingListener
from quark.training.exactness import Exactness, differences
from quark.training.exploration import REFERENCE_BLOCK, Explorer
from quark.training.metrics import MetricLog, SilentLog
from quark.training.published import PublishedWeights
from quark.training.seeds import derive_seed
from quark.training.sharding import ShardedWeights, WholeWeights
from quark.training.shared import LeadGenerator, SharedEvaluator, SharedGenerator
from quark.training.trackers import make_trackers
from quark.training.trainer import Trainer
from quark.types import Prompt

RUN_FORMAT = 1
_FROZEN = "frozen weights"
BUILT_IN_REWARDS = frozenset({"sentiment", "toxicity", "vader", "diversity", "length", "regex"})
MAY_CHANGE = (
    "run.num_rounds",
    "run.num_threads",
    "run.overlap_scoring",
    "sampling.http",
    "run.peer_timeout_s",
    "run.parallel",
    "model.gradient_checkpointing",
    "reward.on_error",
    "reward.retries",
    "reward.timeout_s",
    "evaluation.",
    "checkpoint.",
    "alerts.",
    "tracking.",
    "optimizer.max_skipped_steps",
    "optimizer.micro_batch_size",
)
"""Keys that a resumed run may have changed; any other one would make it a different run."""


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

    def enter() -> dict[str, Any]:
        was_cleared = _clear(run, fresh=fresh, force=force)
        return _enter(run, loaded, listener, exactness, is_ours=was_cleared)

    identity = team.from_lead(enter)
    listener.on_progress(Progress(phase="loading", round=0, done=0, total=1))
    device = team.place(choose_device(config.run.device))
    if config.run.num_threads is not None:
        torch.set_num_threads(config.run.num_threads)
    autocast = make_autocast(config.run.precision, device)
    _check_scope(config)
    reward = build_reward(config.reward) if team.is_lead else _Unasked(config.reward.name)
    judges = build_judges(config.evaluation.judges, config.reward) if team.is_lead else {}
    extra_rewards = build_judges(config.pool.extra_scores, config.reward) if team.is_lead else {}
    if config.reward.name not in BUILT_IN_REWARDS:
        _say_reward(reward, listener)
    if team.is_lead:
        _check_code(run, config, reward, identity, exactness)
    policy = load_policy(
        config.model,
        num_quantiles=config.pool.num_quantiles,
        seed=derive_seed(config.run.seed, "reward tokens"),
        device=device,
    )
    if config.model.dtype != "float32" and policy.adapter is None:
        listener.on_message(
            f"model.dtype = {config.model.dtype}: steps below about a 500th of a weight are rounded away, and the "
            'optimizer\'s moments are as coarse. Leave it at float32 (run.precision = "bfloat16" computes in '
            "bfloat16 all the same), or train adapters (model.lora.rank)",
            level="warning",
        )
    policy.model.eval()  # dropout stays off, as in the published code: it would blur the KL
    fingerprint = make_fingerprint(device, team) | _adapter_fingerprint(policy)
    weights = WholeWeights(policy, team)
    if team.is_sharded:
        dtype = autocast_dtype(config.run.precision, device)
        weights = ShardedWeights(policy, team, autocast_dtype=dtype)
    serving = None
    if config.sampling.backend == "http":
        with weights.whole():
            serving = _serving(run, config, weights.alone, listener) if team.is_lead else None
    reference = weights.place(_reference(config, policy, device))
    prompts = _prompts(config)
    for note in prompts.notes:
        listener.on_message(note, level="warning")
    pool = _open_shared_pool(team, run, config, policy, prompts, identity["run_id"])
    try:
        if config.reference.cache == "hidden":
            reference = CachedReference(
                reference,
                files=RowFiles(run.reference_cache),
                pool=pool,
                run_id=identity["run_id"],
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
            found = _find_checkpoint(run, checkpoints, listener)
            if found is not None:
                _say_resumed(found.state, fingerprint, listener, exactness)
            # Not before: a start that is refused leaves the run as it was, and it may be another process's.
            _record(run, loaded, identity)
            return found.path.name if found is not None else None

        name = team.from_lead(find)
        # Each process reads it for itself, and every byte is checked.
        resume_from = verify(run.checkpoints / name) if name is not None else None
        log: MetricLog | SilentLog = SilentLog()
        if team.is_lead:
            log = MetricLog(
                run.metrics,
                offset=int(resume_from.state["metrics_bytes"]) if resume_from is not None else 0,
                trackers=make_trackers(
                    config.tracking.trackers,
                    run.path,
                    project=config.tracking.project,
                    run_id=identity["run_id"],
                    config=config.model_dump(mode="json"),
                ),
            )
        if resume_from is None:
            log.write(
                "run",
                0,
                run_id=identity["run_id"],
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

    held_out = config.sampling
    if config.evaluation.top_p is not None:
        held_out = held_out.model_copy(update={"top_p": config.evaluation.top_p})
    evaluator = Evaluator(
        prompts=prompts.evaluation,
        reference=reference,
        reward=reward,
        judges=judges,
        completions_per_prompt=config.evaluation.completions_per_prompt,
        batch_size=config.sampling.batch_size,
        seed=derive_seed(config.run.seed, "evaluate"),
        retries=config.reward.retries or 0,
    )
    return Trainer(
        config=config,
        run=run,
        run_id=identity["run_id"],
        policy=policy,
        reference=reference,
        explore_first=generator(reference, config.sampling),
        explore=generator(weights, config.sampling),
        evaluate_first=generator(reference, held_out),
        evaluate=generator(weights, held_out),
        explorer=Explorer(
            run_id=identity["run_id"],
            seed=config.run.seed,
            prompts=prompts.train,
            pool=pool,
            reward=reward,
            extra_rewards={_column_name(name): judge for name, judge in extra_rewards.items()},
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
class RenderedPrompt:
    """A prompt as the policy sees it, answered by the original model, with the answer's score."""

    text: str
    """With the best reward token in front."""
    token_ids: tuple[int, ...]
    completion: str
    reward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a run would begin with."""

    device: str
    num_parameters: int
    num_train_prompts: int
    num_evaluation_prompts: int
    notes: tuple[str, ...]
    prompts: tuple[RenderedPrompt, ...]


def dry_run(loaded: LoadedConfig, *, listener: TrainingListener) -> DryRun:
    """Load model, tokenizer and reward, answer and score three prompts; nothing is written."""
    config = loaded.config
    listener.on_progress(Progress(phase="loading", round=0, done=0, total=1))
    device = choose_device(config.run.device)
    _check_scope(config)
    reward = build_reward(config.reward)
    build_judges(config.evaluation.judges, config.reward)
    build_judges(config.pool.extra_scores, config.reward)
    policy = load_policy(
        config.model,
        num_quantiles=config.pool.num_quantiles,
        seed=derive_seed(config.run.seed, "reward tokens"),
        device=device,
    )
    if policy.adapter is None:
        original = CausalModel(load_base_model(config.model, device=device))
    else:
        original = AdapterOffReference(policy).causal
    prompts = _prompts(config)
    shown: list[Prompt] = list(prompts.train[:3])
    generator = TransformersGenerator(
        original, policy.tokenizer, policy.reward_tokens, config.sampling, device
    )
    with make_autocast(config.run.precision, device)():
        completions = generator.generate(
            shown, quantile=None, seed=derive_seed(config.run.seed, "dry run")
        )
    outcome = score(
        reward,
        [c.prompt.text for c in completions],
        [c.text for c in completions],
        on_error=config.reward.on_error,
    )
    best = policy.reward_tokens.texts[-1]
    return DryRun(
        device=str(device),
        num_parameters=sum(p.numel() for p in policy.model.parameters()),
        num_train_prompts=len(prompts.train),
        num_evaluation_prompts=len(prompts.evaluation),
        notes=(*prompts.notes, *outcome.messages),
        prompts=tuple(
            RenderedPrompt(
                text=best + completion.prompt.text,
                token_ids=(policy.reward_tokens.best, *completion.prompt.token_ids),
                completion=completion.text,
                reward=float(value),
            )
            for completion, value in zip(completions, outcome.scores, strict=True)
        ),
    )


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: torch does not know or have the device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise ConfigError(f"run.device = {name!r}: torch cannot use it here: {err}") from err
    return device


def make_autocast(
    precision: str, device: torch.device
) -> Callable[[], AbstractContextManager[object]]:
    """The context for forward passes."""
    dtype = autocast_dtype(precision, device)
    if dtype is None:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """None where there is no autocast; ``auto`` is bfloat16 on CUDA devices that have it."""
    wanted = precision == "bfloat16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return torch.bfloat16 if wanted else None


def build_judges(names: tuple[str, ...], settings: RewardConfig) -> Mapping[str, RewardFunction]:
    """Rewards that are measured and never trained on, as the sections of ``settings`` for each kind say."""
    sections = {
        "classifier": settings.classifier,
        "http": settings.http,
        "length": settings.length,
        "regex": settings.regex,
    }
    return {
        name: build_reward(RewardConfig(name=name, on_error="nan", **sections)) for name in names
    }


def make_fingerprint(device: torch.device, team: Team | None = None) -> dict[str, str]:
    """What a byte-exact resume needs to be equal: device kind, processes, threads, versions."""
    team = team or Team()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} {name}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processes": f"{team.size}{' sharded' if team.is_sharded else ''}",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "quark": quark.__version__,
        **{
            package: version(package)
            for package in ("torch", "transformers", "tokenizers", "numpy")
        },
    }


def _reference(config: RunConfig, policy: Policy, device: torch.device) -> ReferencePolicy:
    """The original model: below the policy's adapters, or a copy of its own."""
    if policy.adapter is not None:
        return AdapterOffReference(policy)
    return FrozenReference(
        load_base_model(config.model, device=device),
        autocast_dtype=autocast_dtype(config.run.precision, device),
    )


def _adapter_fingerprint(policy: Policy) -> dict[str, str]:
    """What besides has to be equal where a checkpoint holds adapters alone."""
    if policy.adapter is None:
        return {}
    return {"peft": version("peft"), _FROZEN: frozen_digest(policy.model)}


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
            'sampling.backend = "http" with a model that has learned absolute positions: a server counts them '
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


def _check_share(config: RunConfig, team: Team) -> None:
    if team.is_sharded and config.reference.cache != "off":
        raise ConfigError(
            f'reference.cache = "{config.reference.cache}" with run.parallel = "sharded": one process would need all '
            'weights of the original model whenever a sample is not in the cache. Set reference.cache = "off", or '
            'run.parallel = "data"'
        )
    if config.optimizer.batch_size < team.size:
        raise ConfigError(
            f"optimizer.batch_size = {config.optimizer.batch_size} is less than one sample for each of "
            f"{team.size} processes"
        )


def _check_scope(config: RunConfig) -> None:
    """Raise ConfigError where ``pool.where`` is no condition on columns that the pool will have."""
    if config.pool.where is not None:
        extra = map(_column_name, config.pool.extra_scores)
        check_condition(config.pool.where, (REWARD_COLUMN, *extra))


def _clear(run: RunDirectory, *, fresh: bool, force: bool) -> bool:
    """Make way for a new run where that was asked for; returns whether a run of ours was deleted."""
    if not fresh or not run.path.exists():
        return False
    if not run.is_run():
        if any(run.path.iterdir()):
            raise RunDirectoryError(f"{run.path} is not a run of quark: nothing in it is touched")
        return False
    if not force:
        raise RunDirectoryError(
            f"{run.path} holds a run. Leave out --fresh to resume it, choose another --run-dir, or add "
            "--force to delete it"
        )
    folders = [run.pool, run.model, run.served, run.reference_cache, run.path / "tensorboard"]
    folders += run.path.glob("model.p*")
    for path in folders:
        if path.is_symlink():
            raise RunDirectoryError(f"{path} is a link: remove it yourself")
    try:
        NativePool.open(run.pool, writable=True).close()
    except PoolLockedError:
        raise  # another process trains on it
    except (PoolError, ValueError, OSError):
        pass  # damaged or not there: no reason to keep the run
    Checkpoints(run.checkpoints, keep_last=2).remove_all()
    for path in folders:
        if path.exists():
            shutil.rmtree(path)
    for path in (run.metrics, run.report, run.config, run.identity):
        path.unlink(missing_ok=True)
    return True


def _enter(
    run: RunDirectory,
    loaded: LoadedConfig,
    listener: TrainingListener,
    exactness: Exactness,
    *,
    is_ours: bool,
) -> dict[str, Any]:
    """Make the run directory, or check that it is this run's; returns its identity."""
    if run.is_run():
        try:
            identity: dict[str, Any] = json.loads(run.identity.read_bytes())
            known = identity["format_version"] == RUN_FORMAT and isinstance(identity["run_id"], str)
        except (ValueError, KeyError, TypeError) as err:
            raise RunDirectoryError(f"{run.identity} is damaged: {err}") from err
        if not known:
            raise RunDirectoryError(f"{run.identity} was written by another version of quark")
        _check_config(run, loaded.config, exactness)
        listener.on_message(f"resuming the run in {run.path}")
    else:
        if run.path.exists() and not is_ours and not _is_empty(run):
            raise RunDirectoryError(
                f"{run.path} exists and is not a run of quark: choose another --run-dir"
            )
        identity = {
            "format_version": RUN_FORMAT,
            "run_id": uuid.uuid4().hex,
            "quark_version": quark.__version__,
        }
    if not run.pool.exists():
        _record(run, loaded, identity)
    return identity


def _record(run: RunDirectory, loaded: LoadedConfig, identity: dict[str, Any]) -> None:
    """Say in the run directory with which configuration the run goes on."""
    identity["origins"] = dict(loaded.origins)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        _replace_text(run.config, to_toml(loaded.config, comments=False))
        _replace_text(run.identity, json.dumps(identity, indent=1) + "\n")
    except OSError as err:
        raise RunDirectoryError(f"cannot make the run directory {run.path}: {err}") from err


def _is_empty(run: RunDirectory) -> bool:
    """Whether there is nothing in the directory but what a run that died at its very start left."""
    leftovers = {run.config, _staged(run.config), _staged(run.identity)}
    return run.path.is_dir() and leftovers.issuperset(run.path.iterdir())


def _staged(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _replace_text(path: Path, text: str) -> None:
    """Write a small file that is either the old or the new one, whatever happens."""
    staged = _staged(path)
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def _check_config(run: RunDirectory, config: RunConfig, exactness: Exactness) -> None:
    """Raise ConfigError where the run that is there is to be continued as another one."""
    if not run.pool.exists():
        return  # It failed before it began, perhaps for the very setting that is corrected now.
    if not run.config.is_file():
        raise RunDirectoryError(f"{run.config} is missing: this run cannot be resumed")
    before = load_config(run.config).config.model_dump(mode="json")
    after = config.model_dump(mode="json")
    changed = [
        f"{section}.{key}: {before[section].get(key)!r} -> {value!r}"
        for section, values in after.items()
        for key, value in values.items()
        if before[section].get(key) != value
        and not any(f"{section}.{key}".startswith(prefix) for prefix in MAY_CHANGE)
    ]
    voids: list[str] = []
    rounds = before["run"]["num_rounds"], after["run"]["num_rounds"]
    if config.optimizer.schedule != "constant" and rounds[0] != rounds[1]:
        voids.append(f"run.num_rounds {rounds[0]} -> {rounds[1]}, to which the learning rate falls")
    parts = before["optimizer"]["micro_batch_size"], after["optimizer"]["micro_batch_size"]
    if parts[0] != parts[1]:
        voids.append(
            f"optimizer.micro_batch_size {parts[0]} -> {parts[1]}, by which gradients are added up"
        )
    is_rescored = _is_rescored(run, config)
    if is_rescored:
        others = [line for line in changed if not line.startswith("reward.")]
        if others != changed:
            voids.append(
                f"the reward is another one from here on ({config.reward.name}): all samples have its scores, "
                "but figures of earlier rounds, and those of before training, are the old one's"
            )
        changed = others
    if changed:
        way_out = "Set these back, or choose another --run-dir"
        if any(line.startswith("reward.") for line in changed):
            way_out += (
                "; for another reward, score the samples that are there first: "
                f"quark pool rescore {run.path} {config.reward.name}"
            )
        raise ConfigError(
            f"{run.path} was made with another configuration:\n  "
            + "\n  ".join(changed)
            + f"\n{way_out}"
        )
    exactness.void(voids)


def _check_code(
    run: RunDirectory,
    config: RunConfig,
    reward: RewardFunction,
    identity: dict[str, Any],
    exactness: Exactness,
) -> None:
    """Say where a function's file is not the one that scored the samples so far, and keep in ``identity`` which is."""
    before, now = identity.get("reward_sha256"), reward_provenance(reward).get("sha256")
    identity["reward_sha256"] = now
    if before in (None, now) or not run.pool.exists() or _is_rescored(run, config):
        return
    exactness.void(
        [
            f"the file of the reward {config.reward.name} was changed, and earlier samples keep their scores "
            f"(quark pool rescore {run.path} {config.reward.name} makes them anew)"
        ]
    )


def _is_rescored(run: RunDirectory, config: RunConfig) -> bool:
    """Whether all rewards in the run's pool were made anew, by the reward that the run is to go on with.

    Raises:
        ConfigError: they were made anew by another one, so that two rewards would be ranked as one.
    """
    if not run.pool.exists():
        return False
    with NativePool.open(run.pool) as pool:
        columns = {column.name: column for column in pool.info().score_columns}
    column = columns.get(REWARD_COLUMN)
    if column is None or not column.source:
        return False
    # As it was stored: through JSON.
    provenance = json.loads(json.dumps(dict(reward_provenance(build_reward(config.reward)))))
    if provenance != dict(column.source):
        scored_by = str(column.source.get("name"))
        if scored_by == provenance["name"]:
            # Their difference is in a setting, a file or an address.
            scored_by += f" with other settings ({json.dumps(dict(column.source))})"
        raise ConfigError(
            f"the samples in {run.pool} were scored anew by {scored_by}, and the reward of the "
            f"run is {config.reward.name}: --set reward.name, and its settings, to the former, or score them by the "
            f"latter: quark pool rescore {run.path} {config.reward.name}"
        )
    return True


def _open_pool(
    run: RunDirectory, config: RunConfig, policy: Policy, prompts: PromptSet, run_id: str
) -> NativePool:
    """The run's pool, opened for writing.

    Raises:
        DataError: it was filled from other prompts than these, or measured on others.
    """
    trained, held_out = _digest(prompts.train), _digest(prompts.evaluation)
    if not run.pool.exists():
        return NativePool.create(
            run.pool,
            vocab_size=policy.reward_tokens.base_vocab_size,
            store_text=config.pool.store_text,
            tie_seed=derive_seed(config.run.seed, "ties"),
            metadata={
                "model": config.model.name,
                "run_id": run_id,
                "prompts": trained,
                "held_out_prompts": held_out,
            },
        )
    pool = NativePool.open(run.pool, writable=True)
    known = pool.info().metadata
    changed = config.prompts.source if known.get("prompts") != trained else None
    # A pool of an older quark does not say which prompts were held out.
    if changed is None and known.get("held_out_prompts", held_out) != held_out:
        changed = f"{config.prompts.evaluation_source or config.prompts.source} that are held out"
    if changed is not None:
        pool.close()
        raise DataError(
            f"the prompts of {changed} are not those that {run.path} was started with: "
            "bring them back, or choose another --run-dir"
        )
    return pool


def _open_shared_pool(
    team: Team,
    run: RunDirectory,
    config: RunConfig,
    policy: Policy,
    prompts: PromptSet,
    run_id: str,
) -> NativePool:
    """The run's pool, opened for writing in the lead and after that for reading in the others.

    Raises:
        DataError: it was filled from other prompts than these.
        TrainingError: another process does not find it.
    """
    opened: list[NativePool] = []

    def open_for_writing() -> None:
        opened.append(_open_pool(run, config, policy, prompts, run_id))

    team.from_lead(open_for_writing)
    if team.is_lead:
        return opened[0]
    if not run.pool.exists():
        raise TrainingError(
            f"process {team.rank} does not find {run.pool.absolute()}, which process 0 has made: the run "
            "directory has to be on a file system that all machines share"
        )
    return NativePool.open(run.pool)


def _find_checkpoint(
    run: RunDirectory, checkpoints: Checkpoints, listener: TrainingListener
) -> Checkpoint | None:
    """The one to go on from, None for a new run; it fits the pool."""
    found, rejected = checkpoints.newest()
    for reason in rejected:
        listener.on_message(f"checkpoint rejected: {reason}", level="warning")
    if found is None and rejected:
        raise CheckpointError(
            f"none of the checkpoints in {run.checkpoints} verifies; move them away to start from "
            "the pool's samples alone"
        )
    if found is not None:
        _check_pool(run, found.state["pool"])
    return found


def _digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts' tokens, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt.token_ids).encode())
    return digest.hexdigest()


def _check_pool(run: RunDirectory, expected: Mapping[str, Any]) -> None:
    """Refuse a pool that is not a continuation of the one a checkpoint was made with."""
    # A round under way may learn from an older one: the pool was changed while the run had stopped.
    needed = min(expected["generation"], expected.get("learns_from") or expected["generation"])
    with NativePool.open(run.pool) as pool:
        oldest = pool.oldest_generation
    if oldest > needed:
        raise CheckpointError(
            f"{run.pool} has given up snapshot {needed}, from which the checkpoint goes on: `quark pool gc` left those "
            f'from {oldest} on. What it holds now is whole: docs/pool.md shows how to train on it, under "Another K"'
        )
    try:
        with NativePool.open(run.pool, snapshot=expected["generation"]) as pool:
            if pool.snapshot.hash == expected["hash"]:
                return
            reason = "has another history than the checkpoint's"
    except ValueError:
        reason = "lacks samples that the checkpoint's training saw"
    raise CheckpointError(f"{run.pool} {reason}: it was replaced or rolled back")


def _column_name(name: str) -> str:
    """A pool column's name for a reward's."""
    return re.sub(r"[^a-z0-9_.-]", "_", name.lower())[-64:]


def _prompts(config: RunConfig) -> PromptSet:
    """The prompts, in the original model's tokens: a reward token's text in a prompt stays text."""
    return load_prompts(
        config.prompts, load_tokenizer(config.model), seed=derive_seed(config.run.seed, "split")
    )


def _say_reward(reward: RewardFunction, listener: TrainingListener) -> None:
    """Name the code, files or server that score."""
    details = {k: v for k, v in reward_provenance(reward).items() if k != "name"}
    if details:
        listener.on_message(
            f"reward {reward.name}: "
            + ", ".join(f"{key} {value}" for key, value in details.items())
        )


def _say_resumed(
    state: Mapping[str, Any],
    fingerprint: Mapping[str, str],
    listener: TrainingListener,
    exactness: Exactness,
) -> None:
    listener.on_message(
        f"continuing from the checkpoint of step {state['step']} (round {state['position']['round']})"
    )
    frozen = state["fingerprint"].get(_FROZEN)
    if frozen != fingerprint.get(_FROZEN):
        raise CheckpointError(
            f"the weights below the adapters are not those of the checkpoint of step {state['step']}: "
            "model.name gives another model than it did. Bring that one back, or choose another --run-dir"
        )
    exactness.void(differences(state["fingerprint"], fingerprint))
