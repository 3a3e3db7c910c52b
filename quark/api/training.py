"""Runs a training from its configuration to its report: what `quark train` and `quark.train` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from quark.api.cards import card_of
from quark.api.trust import remember
from quark.config.load import LoadedConfig
from quark.errors import QuarkError
from quark.publication import publish_file
from quark.report.render import write_report
from quark.run_directory import RunDirectory
from quark.training.assemble import assemble
from quark.training.events import TrainingListener, TrainingResult
from quark.training.given import Given
from quark.training.loop.trainer import Trainer
from quark.training.processes.process_group import join_process_group


def run_training(
    loaded: LoadedConfig,
    directory: Path,
    *,
    listener: TrainingListener,
    on_start: Callable[[Trainer], object],
    fresh: bool = False,
    force: bool = False,
    require_exact: bool = False,
    given: Given | None = None,
    from_pool: Path | None = None,
) -> TrainingResult:
    """Start or resume the run in ``directory``, and write its report.

    Args:
        loaded: the configuration.
        directory: of the run.
        listener: is told what happens.
        on_start: gets the trainer before it runs, in every process.
        fresh: start over.
        force: with ``fresh``: delete the run that is there.
        require_exact: refuse to resume where the result would differ from an uninterrupted run.
        given: the objects that the configuration stands for.
        from_pool: whose samples are the first round of a new run.

    Raises:
        QuarkError: as ``assemble`` and the trainer say.
    """
    section = loaded.config.run
    with join_process_group(
        timeout_s=section.peer_timeout_s, parallel=section.parallel
    ) as processes:
        trainer = assemble(
            loaded,
            directory,
            listener=listener,
            processes=processes,
            fresh=fresh,
            force=force,
            require_exact=require_exact,
            given=given,
            from_pool=from_pool,
        )
        if processes.is_main_process:
            remember(loaded.config, directory)
        on_start(trainer)
        result = trainer.run()
        return _with_report(result, listener) if processes.is_main_process else result


def _with_report(result: TrainingResult, listener: TrainingListener) -> TrainingResult:
    """Write the report and the model's card. A failure is only a warning, because both are views of the run."""
    try:
        path = write_report(result.run_dir)
        if not result.interrupted:
            run = RunDirectory(result.run_dir)
            publish_file(run.model / "README.md", card_of(run))
        return dataclasses.replace(result, report=path)
    except (QuarkError, OSError) as error:
        listener.on_message(f"no report: {error}", level="warning")
        return result
