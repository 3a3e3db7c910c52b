"""The configuration with which an existing pool is learned from: what `quark fit` and `Pool.fit` share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quark.api.trust import check_reach, check_source
from quark.config.load import load_config
from quark.config.schema import RunConfig
from quark.errors import ConfigError
from quark.run_directory import RunDirectory

CONTRAST = ("model.reward_tokens=true", "objective.lm_coef=0", "objective.contrast_coef=1")
"""The objective if no configuration is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """What a fit is configured with."""

    config: RunConfig
    is_rate_chosen: bool
    """Whether the fit chooses the learning rate, because nobody gave one for this model."""


def fitting(
    path: Path,
    *,
    model: str | None,
    source: str | None = None,
    overrides: Sequence[str] = (),
    settings: Mapping[str, object] | None = None,
    steps: int,
    held_out: float,
    allow: Collection[str] | None,
    model_option: str = "--model",
) -> Fitting:
    """The configuration from a call and, without ``source``, from the pool's run.

    Args:
        path: a pool or a run directory.
        model: the model that wrote the samples; None is the run's.
        source: a preset or a file.
        overrides: ``section.key=value``.
        settings: values by section and key, over the overrides.
        steps: of the optimizer.
        held_out: share of the prompts to measure on.
        allow: what the run's own configuration may reach.
        model_option: how the caller names the model.

    Raises:
        ConfigError: a value does not fit, no model is named, or the run's own is not allowed.
    """
    values = {section: dict(_table(part)) for section, part in (settings or {}).items()}
    run = RunDirectory.around(path)
    is_model_named = (
        model is not None
        or "name" in values.get("model", {})
        or any(text.startswith("model.name=") for text in overrides)
    )
    is_rate_named = "learning_rate" in values.get("optimizer", {}) or any(
        text.startswith("optimizer.learning_rate=") for text in overrides
    )
    if source is None and not run.is_run() and not is_model_named:
        raise ConfigError(
            f"{path} is in no run directory: say with {model_option} which model wrote its samples"
        )
    fixed: dict[str, dict[str, object]] = {
        "run": {"num_rounds": 1, "steps_per_round": steps, "brake_every_steps": None},
        "pool": {"held_out_share": held_out},
        "model": {} if model is None else {"name": model},
    }
    table = {
        section: values.get(section, {}) | fixed.get(section, {})
        for section in values.keys() | fixed.keys()
    }
    if source is not None:
        loaded = load_config(source, overrides, table=table)
        check_source(loaded, source, allow)
    elif run.is_run():
        loaded = load_config(run.own(run.config), [*CONTRAST, *overrides], table=table)
        named = [("model.name", loaded.config.model.name)] if is_model_named else []
        check_reach(loaded.config, run.path, sections=("model",), named=named, allow=allow)
    else:
        loaded = load_config(None, [*CONTRAST, *overrides], table=table)
    return Fitting(
        config=loaded.config,
        is_rate_chosen=source is None and not run.is_run() and not is_rate_named,
    )


def _table(part: object) -> Mapping[str, object]:
    if not isinstance(part, Mapping):
        raise ConfigError(f"{part!r} is not a table of settings")
    return part
