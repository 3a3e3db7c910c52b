"""Finds the pool and the checkpoint to resume from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from quark.config.schema import RunConfig
from quark.data.prompts import PromptSet
from quark.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RunDirectoryError,
    TrainingError,
)
from quark.models.policy import Policy
from quark.pool.native import NativePool
from quark.publication import publishing_directory
from quark.run_directory import RunDirectory
from quark.training.events import TrainingListener
from quark.training.processes.process_group import ProcessGroup
from quark.training.seeds import derive_seed
from quark.training.state.checkpoint import Checkpoint, Checkpoints
from quark.training.state.exactness import FROZEN_WEIGHTS, Exactness, differences
from quark.training.state.held_out import fields_digest, prompts_digest, write_held_out
from quark.training.state.run_state import PoolState


def open_shared_pool(
    processes: ProcessGroup,
    run: RunDirectory,
    config: RunConfig,
    policy: Policy,
    prompts: PromptSet,
    run_id: str,
    copy_first_round: Callable[[NativePool], None] | None = None,
    *,
    reads_fields: bool = False,
) -> NativePool:
    """The run's pool, opened for writing in the main process, and then for reading in the others.

    Args:
        processes: all of which call this.
        run: whose pool it is.
        config: of the run.
        policy: its vocabulary is the pool's.
        prompts: of the run.
        run_id: of the run.
        copy_first_round: fills a pool that is made, which appears with these samples or not at all.
        reads_fields: whether a reward reads fields of the prompts' rows, which then have to be the same ones.

    Raises:
        DataError: it was filled from other prompts.
        TrainingError: another process cannot find it.
    """
    opened: list[NativePool] = []

    def open_for_writing() -> None:
        pool = _open_pool(
            run, config, policy, prompts, run_id, copy_first_round, reads_fields=reads_fields
        )
        opened.append(pool)

    processes.from_main_process(open_for_writing)
    if processes.is_main_process:
        return opened[0]
    if not run.pool.exists():
        raise TrainingError(
            f"process {processes.rank} does not find {run.pool.absolute()}, which process 0 has made: the run "
            "directory has to be on a file system that all machines share"
        )
    return NativePool.open(run.pool)


def find_checkpoint(
    run: RunDirectory,
    checkpoints: Checkpoints,
    fingerprint: Mapping[str, str],
    listener: TrainingListener,
    exactness: Exactness,
    *,
    num_rounds: int,
) -> Checkpoint | None:
    """The checkpoint to resume from, which fits the pool; None for a new run.

    Args:
        run: the run whose pool it has to fit.
        checkpoints: the checkpoints of the run.
        fingerprint: the fingerprint of this process, from ``make_fingerprint``.
        listener: receives messages.
        exactness: receives reasons why the rest of the run will not be exact.
        num_rounds: the number of rounds of the run.

    Raises:
        ConfigError: the run has already begun more rounds.
        CheckpointError: no checkpoint verifies, or it was made with another pool or model.
    """
    found, rejected = checkpoints.newest()
    for reason in rejected:
        listener.on_message(f"checkpoint rejected: {reason}", level="warning")
    if found is None and rejected:
        raise CheckpointError(
            f"none of the checkpoints in {run.checkpoints} verifies; move them away to start from "
            "the pool's samples alone"
        )
    if found is None:
        return None
    state = found.state
    _check_pool(run, state.pool)
    done, steps_beyond = state.position.round, state.position.step_in_round
    if num_rounds < done + (steps_beyond > 0):
        begun = " and another one has begun" if steps_beyond else ""
        raise ConfigError(
            f"run.num_rounds is {num_rounds}, but {done} rounds of {run.path} are done{begun}: set it to at least "
            f"{done + (steps_beyond > 0)}, or choose another --run-dir"
        )
    place = f"in round {done}" if done < num_rounds else "after the last round"
    listener.on_message(f"continuing from the checkpoint of step {state.step}, {place}")
    if state.fingerprint.get(FROZEN_WEIGHTS) != fingerprint.get(FROZEN_WEIGHTS):
        raise CheckpointError(
            f"the weights below the adapters are not those of the checkpoint of step {state.step}: "
            "model.name gives another model than it did. Bring that one back, or choose another --run-dir"
        )
    exactness.void(differences(state.fingerprint, fingerprint))
    return found


def _open_pool(
    run: RunDirectory,
    config: RunConfig,
    policy: Policy,
    prompts: PromptSet,
    run_id: str,
    copy_first_round: Callable[[NativePool], None] | None,
    *,
    reads_fields: bool,
) -> NativePool:
    """The run's pool, opened for writing.

    Raises:
        DataError: it was filled by another model or from other prompts, or has other held-out prompts.
        RunDirectoryError: the held-out prompts cannot be recorded.
    """
    trained, held_out = prompts_digest(prompts.train), prompts_digest(prompts.evaluation)
    fields = fields_digest([*prompts.train, *prompts.evaluation])
    if not run.pool.exists():
        _record(run, config, prompts)
        create = functools.partial(
            NativePool.create,
            vocab_size=policy.reward_tokens.base_vocab_size,
            store_text=config.pool.store_text,
            tie_seed=derive_seed(config.run.seed, "ties"),
            metadata={
                "model": config.model.name,
                "run_id": run_id,
                "prompts": trained,
                "held_out_prompts": held_out,
                "fields": fields,
            },
        )
        if copy_first_round is None:
            return create(run.pool)
        with publishing_directory(run.pool) as staged, create(staged) as filled:
            copy_first_round(filled)
        return NativePool.open(run.pool, writable=True)
    pool = NativePool.open(run.pool, writable=True)
    wanted, found = pool.settings.vocab_size, policy.reward_tokens.base_vocab_size
    if wanted > found:
        pool.close()
        raise DataError(
            f"{run.pool} holds tokens of a vocabulary of {wanted}, and {config.model.name} has one of {found}: bring back "
            "the model that wrote them, or choose another --run-dir"
        )
    known = pool.info().metadata
    changed = config.prompts.source if known.get("prompts") != trained else None
    # A pool of an older quark does not record the held-out prompts.
    if changed is None and known.get("held_out_prompts", held_out) != held_out:
        changed = f"{config.prompts.evaluation_source or config.prompts.source} that are held out"
    if changed is None and reads_fields and known.get("fields", fields) != fields:
        pool.close()
        raise DataError(
            f"the prompts of {config.prompts.source} have other fields than when {run.path} was started, and a reward "
            "reads them, so its scores would not be those of one reward: bring them back, or choose another --run-dir"
        )
    if changed is not None:
        pool.close()
        way_out = "bring them back, or choose another --run-dir"
        if not run.held_out.exists():
            way_out += ". A run that an older quark began cannot go on where its held-out prompts repeat trained ones"
        raise DataError(
            f"the prompts of {changed} are not those that {run.path} was started with: {way_out}"
        )
    if not run.held_out.exists():
        try:
            _record(run, config, prompts)
        except RunDirectoryError:
            pool.close()
            raise
    return pool


def _record(run: RunDirectory, config: RunConfig, prompts: PromptSet) -> None:
    try:
        write_held_out(run, config, prompts.evaluation)
    except OSError as err:
        raise RunDirectoryError(f"cannot write {run.held_out}: {err}") from err


def _check_pool(run: RunDirectory, expected: PoolState) -> None:
    """Refuse a pool that does not continue the pool of a checkpoint."""
    # The current round may learn from an older snapshot if the pool was changed while the run was stopped.
    needed = expected.oldest_needed
    with NativePool.open(run.pool) as pool:
        oldest = pool.oldest_generation
    if oldest > needed:
        raise CheckpointError(
            f"{run.pool} has given up snapshot {needed}, from which the checkpoint goes on: `quark pool gc` left those "
            f'from {oldest} on. What it holds now is whole: docs/pool.md shows how to train on it, under "Another K"'
        )
    try:
        with NativePool.open(run.pool, snapshot=expected.generation) as pool:
            if pool.snapshot.hash == expected.hash:
                return
            reason = "has another history than the checkpoint's"
    except ValueError:
        reason = "lacks samples that the checkpoint's training saw"
    raise CheckpointError(
        f"{run.pool} {reason}: it was replaced or rolled back. Bring back the pool that the checkpoints were made "
        "with, or choose another --run-dir"
    )
