"""Builds a trainer from a configuration. Only this module knows every class."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from quark.config.load import LoadedConfig
from quark.models.loading import load_context_length
from quark.pool.native import NativePool
from quark.reference.base import ReferencePolicy
from quark.run_directory import RunDirectory
from quark.run_identity import RunIdentity
from quark.training.context import RunContext, load_context
from quark.training.events import Progress, Silence, TrainingListener
from quark.training.first_round import copy_first_round
from quark.training.generators import Generators, make_serving
from quark.training.given import Given
from quark.training.loop.alerts import Alerts
from quark.training.loop.journal import Journal
from quark.training.loop.metrics import MetricLog, SilentLog
from quark.training.loop.outputs import Outputs
from quark.training.loop.rounds import Rounds
from quark.training.loop.trainer import Trainer
from quark.training.position import Position
from quark.training.preflight import check_processes, preflight
from quark.training.processes.devices import choose_device
from quark.training.processes.process_group import ProcessGroup
from quark.training.rooms import (
    kept_reference,
    make_evaluating,
    make_exploring,
    make_learning,
    open_log,
)
from quark.training.state.checkpoint import Checkpoint, Checkpoints, verify
from quark.training.state.entry import enter, leave, record
from quark.training.state.exactness import Exactness
from quark.training.state.given_round import GivenRound
from quark.training.state.resumption import find_checkpoint, open_shared_pool
from quark.types import Json


def assemble(
    loaded: LoadedConfig,
    run_dir: Path | None,
    *,
    listener: TrainingListener,
    processes: ProcessGroup | None = None,
    fresh: bool = False,
    force: bool = False,
    require_exact: bool = False,
    given: Given | None = None,
    from_pool: Path | None = None,
) -> Trainer:
    """A trainer for a new run, or for the rest of the run in ``run_dir``.

    Args:
        loaded: the configuration.
        run_dir: the run directory; None for ``runs/<name of the configuration's source>``.
        listener: receives the events of the run, only in the main process.
        processes: the process group of the run. All of its processes call this. None for this process only.
        fresh: start over. Fails if there is a run.
        force: with ``fresh``, delete the existing run first.
        require_exact: refuse to resume if the run would not end with the bytes of an uninterrupted one.
        given: the objects that a call passed instead of names.
        from_pool: a pool, or a run directory, whose samples become the first round of a new run. They are copied.

    Raises:
        RunDirectoryError: the directory is not a run, or ``fresh`` found a run.
        PoolLockedError: another process trains this run. Nothing was changed.
        ConfigError: the run was made with another configuration.
        ModelError, DataError, RewardError, PoolError, CheckpointError: errors of the parts.
    """
    config = loaded.config
    given = given or Given()
    processes = processes or ProcessGroup()
    if not processes.is_main_process:
        listener = Silence()
    check_processes(config, processes)
    exactness = Exactness(require_exact, listener)
    exactness.check_device(choose_device(config.run.device))
    run = RunDirectory(run_dir if run_dir is not None else Path("runs") / loaded.name)
    is_new, had_folder = not run.is_run(), run.path.exists()
    given_round = None if from_pool is None else GivenRound.of(from_pool, run)

    def checked_and_entered() -> dict[str, Json]:
        preflight(config, has_given_prompts=given.prompts is not None)
        identity = enter(
            run,
            loaded,
            listener,
            exactness,
            fresh=fresh,
            force=force,
            reward=given.reward,
            given_round=given_round,
        )
        given.keep(run)
        return identity.to_json()

    identity = RunIdentity.of_json(processes.from_main_process(checked_and_entered))
    listener.on_progress(Progress(phase="loading", round=0, done=0, total=1))
    try:
        context = load_context(
            loaded,
            run,
            identity,
            processes=processes,
            listener=listener,
            fresh=fresh,
            reward=given.reward,
        )
    except BaseException:
        if is_new and processes.is_main_process:
            leave(run, identity, keeps_folder=had_folder)
        raise
    serving = make_serving(context)
    pool = _open_pool(context, given_round)
    try:
        checkpoints = Checkpoints(
            run.checkpoints,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
        )

        def find() -> str | None:
            rounds = config.run.num_rounds
            found = find_checkpoint(
                run, checkpoints, context.fingerprint, listener, exactness, num_rounds=rounds
            )
            # Only now: a refused start must not change the run, which another process may be training.
            record(run, loaded, context.identity)
            return found.path.name if found is not None else None

        name = processes.from_main_process(find)
        # Each process reads the checkpoint itself and checks every byte.
        resume_from = verify(run.checkpoints / name) if name is not None else None
        reference = kept_reference(context, pool)
        log = open_log(context, resume_from)
    except BaseException:
        pool.close()
        raise
    return _trainer(
        context,
        Generators(context=context, serving=serving),
        pool=pool,
        reference=reference,
        log=log,
        checkpoints=checkpoints,
        resume_from=resume_from,
    )


def _open_pool(context: RunContext, given_round: GivenRound | None) -> NativePool:
    return open_shared_pool(
        context.processes,
        context.directory,
        context.config,
        context.policy,
        context.prompts,
        context.run_id,
        None if given_round is None else functools.partial(_copy_first_round, context, given_round),
        reads_fields=context.rewards.read_fields,
    )


def _copy_first_round(context: RunContext, given: GivenRound, into: NativePool) -> None:
    copy_first_round(
        into,
        given,
        run_id=context.run_id,
        config=context.config,
        policy=context.policy,
        context_length=load_context_length(context.config.model),
        held_out=context.prompts.evaluation,
        reward=context.rewards.reward,
        listener=context.listener,
    )


def _trainer(
    context: RunContext,
    generators: Generators,
    *,
    pool: NativePool,
    reference: ReferencePolicy,
    log: MetricLog | SilentLog,
    checkpoints: Checkpoints,
    resume_from: Checkpoint | None,
) -> Trainer:
    config = context.config
    position = (
        Position() if resume_from is None else dataclasses.replace(resume_from.state.position)
    )
    journal = Journal(log, context.listener, position, num_rounds=config.run.num_rounds)
    evaluating = make_evaluating(context, generators, reference, journal)
    return Trainer(
        rounds=Rounds.of(config),
        exploring=make_exploring(context, generators, pool, reference, journal),
        learning=make_learning(
            context, reference, journal, measure=lambda: evaluating.best(is_logged=True)
        ),
        evaluating=evaluating,
        outputs=Outputs(
            directory=context.directory,
            run_id=context.run_id,
            fingerprint=context.fingerprint,
            checkpoints=checkpoints,
            config=config,
            journal=journal,
        ),
        alerts=Alerts(config.alerts),
        processes=context.processes,
        position=position,
        resume_from=resume_from,
    )
