"""Starts or resumes a training for a call in Python."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from quark.api.arguments import loaded_with
from quark.api.process import prepare_process
from quark.api.resuming import run_named, with_first_origins
from quark.api.stopping import stop_on_interrupt
from quark.api.training import run_training
from quark.api.trust import check_source
from quark.config.schema import RunConfig
from quark.rewards.given import GivenReward
from quark.run_directory import RunDirectory
from quark.training.events import TrainingListener, TrainingResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A training that has ended, or was interrupted."""

    run: RunDirectory
    result: TrainingResult
    reward: GivenReward | None
    """The reward, if it is an object."""


def start(
    source: str | Path | Mapping[str, object] | RunConfig | None,
    run_dir: Path | None,
    *,
    model: object = None,
    prompts: object = None,
    reward: object = None,
    fresh: bool = False,
    force: bool = False,
    require_exact: bool = False,
    from_pool: Path | None = None,
    listener: TrainingListener,
    allow: Collection[str] = (),
    settings: Mapping[str, object],
) -> Started:
    """Train; arguments and errors as ``quark.train``."""
    prepare_process()
    loaded, run, given = loaded_with(
        source, run_dir, model=model, prompts=prompts, reward=reward, settings=settings
    )
    if (resumed := run_named(source)) is not None:
        check_source(loaded, str(resumed.config), allow)
        loaded = with_first_origins(loaded, resumed)
    elif isinstance(source, str | Path):
        check_source(loaded, str(source), allow)
    config = loaded.config
    listener.on_message(f"training {config.model.name} on {config.reward.name}, in {run.path}")
    with stop_on_interrupt(lambda text: listener.on_message(text, level="warning")) as route:
        result = run_training(
            loaded,
            run.path,
            listener=listener,
            on_start=lambda trainer: route(trainer.request_stop),
            fresh=fresh,
            force=force,
            require_exact=require_exact,
            given=given,
            from_pool=from_pool,
        )
    return Started(run=run, result=result, reward=given.reward)
