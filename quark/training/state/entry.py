"""Enters a run directory: records a new run, or checks that the existing run is the requested one."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import quark
from quark.config.load import LoadedConfig, beside, load_config, to_toml
from quark.config.schema import RunConfig
from quark.errors import ConfigError, PoolError, PoolLockedError, RunDirectoryError
from quark.pool.columns import REWARD_COLUMN
from quark.pool.native import NativePool
from quark.publication import (
    clear_left_overs,
    clear_older_left_over,
    left_overs,
    publish_file,
)
from quark.refusals import way_on
from quark.rewards.base import RewardFunction
from quark.rewards.build import build_reward, reward_content, reward_provenance
from quark.rewards.config import GIVEN_PREFIX
from quark.run_directory import RunDirectory
from quark.run_identity import Files, RunIdentity
from quark.training.events import TrainingListener
from quark.training.state.checkpoint import Checkpoints
from quark.training.state.exactness import Exactness
from quark.training.state.given_round import GivenRound, check_first_round

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
    "combiner.",
    "tracking.",
    "optimizer.max_skipped_steps",
    "optimizer.micro_batch_size",
)
"""Keys that may change when a run is resumed. Any other change would make it a different run."""


def enter(
    run: RunDirectory,
    loaded: LoadedConfig,
    listener: TrainingListener,
    exactness: Exactness,
    *,
    fresh: bool,
    force: bool,
    reward: RewardFunction | None = None,
    given_round: GivenRound | None = None,
) -> RunIdentity:
    """Create the run directory, or check that it belongs to this run. Returns the identity of the run.

    A run to be replaced stays until ``clear``, when the inputs of the new one have been loaded.

    Raises:
        RunDirectoryError: it is not a run, or ``fresh`` found a run without ``force``.
        UnsafeFileError: something in it is a link out of it, or neither a file nor a folder.
        PoolLockedError: ``force`` found a run that another process trains.
        ConfigError: the run was made with another configuration, or another pool for the first round.
    """
    if run.path.is_dir():
        run.check()
    makes_way = fresh and run.is_run()
    if run.is_run() and not fresh:
        identity = RunIdentity.read(run)
        check_first_round(run, identity.first_round, given_round)
        if given_round is not None and not run.pool.exists():
            identity = replace(identity, first_round=given_round.first_round)
        _check_config(run, loaded.config, exactness, reward)
        for path in _files(run):
            clear_older_left_over(path)
        listener.on_message(f"resuming the run in {run.path}")
    else:
        if makes_way:
            _check_clearable(run, force=force)
        elif run.path.exists() and not _is_empty(run):
            raise RunDirectoryError(
                f"{run.path} exists and is not a run of quark: nothing in it is touched; choose another --run-dir"
            )
        identity = RunIdentity(
            run_id=uuid.uuid4().hex,
            quark_version=quark.__version__,
            first_round=None if given_round is None else given_round.first_round,
        )
    if not makes_way and not run.pool.exists():
        record(run, loaded, identity)
    return identity


def leave(run: RunDirectory, identity: RunIdentity, *, keeps_folder: bool) -> None:
    """Delete what ``enter`` and ``Given.keep`` wrote for a new run whose inputs could not be loaded.

    Does nothing where the directory holds anything else, or the run of another process. ``keeps_folder`` says that the
    directory was there before.
    """
    with contextlib.suppress(RunDirectoryError, OSError):
        if RunIdentity.read(run).run_id != identity.run_id or run.pool.exists():
            return
        if set(run.path.iterdir()) <= {run.config, run.identity, run.given}:
            shutil.rmtree(run.given, ignore_errors=True)
            run.config.unlink(missing_ok=True)
            run.identity.unlink()
            if not keeps_folder:
                run.path.rmdir()


def _check_clearable(run: RunDirectory, *, force: bool) -> None:
    """Raise RunDirectoryError or PoolLockedError if a run may not be deleted."""
    if not force:
        raise RunDirectoryError(
            f"{run.path} holds a run. Leave out --fresh to resume it, choose another --run-dir, or add "
            "--force to delete it"
        )
    for path in _folders(run):
        if path.is_symlink():
            raise RunDirectoryError(f"{path} is a link: remove it yourself")
    try:
        NativePool.open(run.pool, writable=True).close()
    except PoolLockedError:
        raise  # another process trains this run
    except (PoolError, ValueError, FileNotFoundError):
        pass  # damaged or missing: no reason to keep the run


def clear(run: RunDirectory, loaded: LoadedConfig, identity: RunIdentity) -> None:
    """Delete the run that the one of ``identity`` replaces, and nothing else. Then record the new run.

    Raises:
        RunDirectoryError, PoolLockedError: it may no longer be deleted.
    """
    with contextlib.suppress(RunDirectoryError):
        if RunIdentity.read(run).run_id == identity.run_id:
            return  # there was no run
    _check_clearable(run, force=True)
    Checkpoints(run.checkpoints, keep_last=2).remove_all()
    _forget_others(run, loaded.config)
    for path in _folders(run):
        if path.exists():
            shutil.rmtree(path)
    for path in (run.model, *_files(run)):
        clear_left_overs(path)
    # The identity is deleted last. Until then, the folder is a run that can be cleared again.
    for path in _files(run):
        path.unlink(missing_ok=True)
    record(run, loaded, identity)


def _forget_others(run: RunDirectory, config: RunConfig) -> None:
    """Delete the prompts and models of an earlier call that ``config`` does not name."""
    named = {Path(config.prompts.source), Path(config.model.name)}
    for path in run.given.iterdir() if run.given.is_dir() else ():
        if path.absolute() not in named:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _folders(run: RunDirectory) -> list[Path]:
    """The folders of a run, without checkpoints."""
    previous = run.model.with_name(f"{run.model.name}.previous")
    return [
        run.pool,
        run.model,
        previous,
        run.served,
        run.reference_cache,
        run.path / "tensorboard",
    ]


def _files(run: RunDirectory) -> list[Path]:
    """The files of a run, the identity last."""
    return [
        run.metrics,
        run.report,
        run.report_markdown,
        run.frontier,
        run.held_out,
        run.standards,
        run.config,
        run.identity,
    ]


def record(run: RunDirectory, loaded: LoadedConfig, identity: RunIdentity) -> None:
    """Record in the run directory the configuration with which the run continues."""
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        publish_file(run.config, to_toml(beside(loaded.config, run.path), comments=False))
        replace(identity, origins=dict(loaded.origins)).write(run)
    except OSError as err:
        raise RunDirectoryError(
            f"cannot write the run directory {run.path}: {err}; {way_on(err)}"
        ) from err


def _is_empty(run: RunDirectory) -> bool:
    """Whether the directory holds only leftovers of a run that died at its start."""
    leftovers = {run.config, *left_overs(run.config), *left_overs(run.identity)}
    return run.path.is_dir() and leftovers.issuperset(run.path.iterdir())


def _check_config(
    run: RunDirectory, config: RunConfig, exactness: Exactness, given: RewardFunction | None
) -> None:
    """Raise ConfigError if the existing run would continue as a different one."""
    if not run.pool.exists():
        return  # It failed before it began, perhaps because of the setting that is now corrected.
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
    if config.reward.members and before["combiner"] != after["combiner"]:
        voids.append(
            f"combiner.rule {before['combiner']['rule']} -> {after['combiner']['rule']} with its settings, by which "
            "all samples are ranked from here on"
        )
    is_rescored = _is_rescored(run, config, given)
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
                f"{_rescoring(run, config.reward.name)}"
            )
        raise ConfigError(
            f"{run.path} was made with another configuration:\n  "
            + "\n  ".join(changed)
            + f"\n{way_out}"
        )
    exactness.void(voids)


def check_rewards(
    run: RunDirectory,
    config: RunConfig,
    rewards: Mapping[str, RewardFunction],
    identity: RunIdentity,
    *,
    is_new: bool = False,
) -> dict[str, dict[str, str]]:
    """The sources of the rewards by score column. Refuses a reward other than the one that scored earlier samples.

    Args:
        run: the run directory.
        config: the configuration with the names of the rewards.
        rewards: the rewards by score column.
        identity: the identity of the run.
        is_new: whether existing samples belong to a run that is replaced.

    Raises:
        ConfigError: a column would hold scores of two different rewards.
    """
    now = {column: dict(reward_content(reward)) for column, reward in rewards.items()}
    before: Mapping[str, Files] = identity.scored_by or {}
    if identity.reward_sha256 is not None:  # as stored before imported modules were recorded
        is_same = identity.reward_sha256 == reward_provenance(rewards[REWARD_COLUMN]).get("sha256")
        before = {} if is_same else {REWARD_COLUMN: {}}
    if is_new or not _has_samples(run):
        return now
    names = {**config.further_columns, REWARD_COLUMN: config.reward.name}
    for column, reward in rewards.items():
        known = before.get(column)
        if known is None or known == now[column] or _is_scored_anew(run, column, reward):
            continue
        files = known.keys() | now[column].keys()
        changed = sorted(file for file in files if known.get(file) != now[column].get(file))
        target = "" if column == REWARD_COLUMN else f" --as {column}"
        raise ConfigError(
            f"the samples in {run.pool} were scored by {names[column]} before {', '.join(changed)} changed, and two "
            "scales would be ranked as one. Set it back, or score them anew: "
            f"{_rescoring(run, names[column])}{target}"
        )
    return now


def _rescoring(run: RunDirectory, reward: str) -> str:
    """The command or the call that re-scores the run's samples with another reward."""
    if reward.startswith(GIVEN_PREFIX):
        return f'quark.Pool.open("{run.path}", writable=True).rescore(REWARD)'
    return f"quark pool rescore {run.path} {reward}"


def _has_samples(run: RunDirectory) -> bool:
    if not run.pool.exists():
        return False
    with NativePool.open(run.pool) as pool:
        return len(pool) > 0


def _source_of(run: RunDirectory, column: str) -> Mapping[str, object]:
    """The source of a re-scored column; empty for a column that was not re-scored."""
    if not run.pool.exists():
        return {}
    with NativePool.open(run.pool) as pool:
        columns = {known.name: known for known in pool.info().score_columns}
    return dict(columns[column].source or {}) if column in columns else {}


def _is_scored_anew(run: RunDirectory, column: str, reward: RewardFunction) -> bool:
    """Whether ``reward``, in its current form, re-scored the whole column."""
    source = _source_of(run, column)
    # In the stored form, after a round trip through JSON.
    provenance = json.loads(json.dumps(dict(reward_provenance(reward))))
    if "files" not in source:  # created before modules were recorded
        provenance.pop("files", None)
    return bool(source) and source == provenance


def _is_rescored(run: RunDirectory, config: RunConfig, given: RewardFunction | None) -> bool:
    """Whether the current reward of the run re-scored the whole pool.

    Raises:
        ConfigError: another reward re-scored it, so that two rewards would be ranked together.
    """
    source = _source_of(run, REWARD_COLUMN)
    if not source:
        return False
    reward = build_reward(config.reward, given)
    if not _is_scored_anew(run, REWARD_COLUMN, reward):
        scored_by = str(source.get("name"))
        if scored_by == reward.name:
            # They differ in a setting, a file or an address.
            scored_by += f" with other settings ({json.dumps(source)})"
        raise ConfigError(
            f"the samples in {run.pool} were scored anew by {scored_by}, and the reward of the "
            f"run is {config.reward.name}: --set reward.name, and its settings, to the former, or score them by the "
            f"latter: {_rescoring(run, config.reward.name)}"
        )
    return True
