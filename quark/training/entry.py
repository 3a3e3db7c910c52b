"""Entering a run directory: a new run is recorded, one that is there must be the one that is asked for."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import quark
from quark.config.load import LoadedConfig, load_config, to_toml
from quark.config.schema import RunConfig
from quark.errors import ConfigError, PoolError, PoolLockedError, RunDirectoryError
from quark.pool.native import NativePool
from quark.rewards.base import RewardFunction
from quark.rewards.build import build_reward, reward_provenance
from quark.run_directory import RunDirectory, staged
from quark.safe_files import read_bytes
from quark.training.checkpoint import Checkpoints
from quark.training.draws import REWARD_COLUMN
from quark.training.events import TrainingListener
from quark.training.exactness import Exactness

RUN_FORMAT = 1
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


def enter(
    run: RunDirectory,
    loaded: LoadedConfig,
    listener: TrainingListener,
    exactness: Exactness,
    *,
    fresh: bool,
    force: bool,
) -> dict[str, Any]:
    """Make the run directory, or check that it is this run's; returns its identity.

    Raises:
        RunDirectoryError: it is not a run of ours, or ``fresh`` met a run without ``force``.
        UnsafeFileError: something in it is a link out of it, or neither a file nor a folder.
        PoolLockedError: ``force`` met a run that another process trains.
        ConfigError: the configuration is not the one that the run was made with.
    """
    if run.path.is_dir():
        run.check()
    was_cleared = _clear(run, fresh=fresh, force=force)
    if run.is_run():
        try:
            identity: dict[str, Any] = json.loads(read_bytes(run.identity, run.path))
            known = identity["format_version"] == RUN_FORMAT and isinstance(identity["run_id"], str)
        except (ValueError, KeyError, TypeError) as err:
            raise RunDirectoryError(f"{run.identity} is damaged: {err}") from err
        if not known:
            raise RunDirectoryError(f"{run.identity} was written by another version of quark")
        _check_config(run, loaded.config, exactness)
        listener.on_message(f"resuming the run in {run.path}")
    else:
        if run.path.exists() and not was_cleared and not _is_empty(run):
            raise RunDirectoryError(
                f"{run.path} exists and is not a run of quark: choose another --run-dir"
            )
        identity = {
            "format_version": RUN_FORMAT,
            "run_id": uuid.uuid4().hex,
            "quark_version": quark.__version__,
        }
    if not run.pool.exists():
        record(run, loaded, identity)
    return identity


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
    for path in folders:  # a link within the run
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
    for path in (run.metrics, run.report, run.held_out, run.config, run.identity):
        path.unlink(missing_ok=True)
    return True


def record(run: RunDirectory, loaded: LoadedConfig, identity: dict[str, Any]) -> None:
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
    leftovers = {run.config, staged(run.config), staged(run.identity)}
    return run.path.is_dir() and leftovers.issuperset(run.path.iterdir())


def _replace_text(path: Path, text: str) -> None:
    """Write a small file that is either the old or the new one, whatever happens."""
    new = staged(path)
    new.unlink(missing_ok=True)  # a link under this name would be written through
    with new.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


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


def check_code(
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
