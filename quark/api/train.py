"""``quark.train``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quark.api.progress import make_listener
from quark.api.run import Run
from quark.api.starting import start
from quark.config.schema import RunConfig

if TYPE_CHECKING:
    from quark.training.events import TrainingListener


def train(
    source: str | Path | Mapping[str, object] | RunConfig | None = "demo",
    *,
    model: object = None,  # a name, or a loaded model with its tokenizer
    prompts: object = None,  # a file, a list, a frame or a data set
    reward: object = None,  # a name, or anything that can be called
    run_dir: str | Path | None = None,
    from_pool: str | Path | None = None,
    fresh: bool = False,
    force: bool = False,
    require_exact: bool = False,
    quiet: bool = False,
    listener: TrainingListener | None = None,
    allow: tuple[str, ...] = (),
    **settings: object,
) -> Run:
    """Train a model on a reward and return its run. A run directory that holds a run is resumed.

    >>> run = quark.train("demo", reward=lambda *, prompts, completions: [len(c) for c in completions])  # doctest: +SKIP

    Args:
        source: a preset (``quark config list``), a TOML file, a run directory to resume, a mapping of sections, or a ``RunConfig``; None is the
            defaults.
        model: what to train: a Hub name, a folder, or ``(model, tokenizer)`` as transformers loaded them, which are
            written to the run directory and stay as they are.
        prompts: a file, a list of texts, a polars or pandas frame, or a ``datasets.Dataset``; of columns, the one that
            ``prompts.field`` names (``prompt``). Rows whose ``split`` is ``eval`` are held out.
        reward: a name, a mapping of settings, or anything that is called as
            ``reward(prompts=[...], completions=[...])`` and returns one number per completion, higher is better; None
            or NaN is "not scored". A function, a lambda, an object, or a class that needs no arguments.
        run_dir: where the run lives. Default: ``runs/NAME OF THE SOURCE``.
        from_pool: a pool, or a run directory, whose samples are the first round of a new run, so that nothing is
            generated or scored for it.
        fresh: start over; refuses an existing run without ``force``.
        force: with ``fresh``: delete the existing run.
        require_exact: refuse to resume if the run would not end with the bytes of an uninterrupted one.
        quiet: show nothing.
        listener: is told what happens, in place of the progress display.
        allow: what the configuration of a run directory may reach, as ``quark train --allow``.
        **settings: settings by key, for example ``num_rounds=4``; a key that several sections have as
            ``optimizer={"batch_size": 32}``.

    Returns:
        The run; ``run.result`` has its figures. After an interruption, ``run.result.interrupted`` is true, and
        ``run.resume()`` continues.

    Raises:
        ConfigError: a setting is wrong, or the run directory holds a run with other settings or another reward.
        QuarkError: a model, prompts or reward cannot be used, or training cannot go on.
    """
    path = None if run_dir is None else Path(run_dir)
    started = start(
        source,
        path,
        model=model,
        prompts=prompts,
        reward=reward,
        fresh=fresh,
        force=force,
        require_exact=require_exact,
        from_pool=None if from_pool is None else Path(from_pool),
        listener=listener or make_listener(is_quiet=quiet),
        allow=allow,
        settings=settings,
    )
    return Run(started.run.path, result=started.result, reward=started.reward)
