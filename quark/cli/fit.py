"""``quark fit``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quark.cli.pool_path import JsonFlag, PoolPath
from quark.cli.trust import AllowOption
from quark.pool.columns import REWARD_COLUMN
from quark.pool.defaults import FIT_EVERY, FIT_HELD_OUT, FIT_STEPS

if TYPE_CHECKING:
    from quark.config.schema import RunConfig
    from quark.training.fit import Fit, FitPoint


def fit(
    path: PoolPath,
    model: Annotated[
        str | None,
        typer.Option(
            help="The model that wrote the pool's samples, as in model.name. Default: the run's.",
            show_default=False,
        ),
    ] = None,
    score: Annotated[str, typer.Option(help="Score column to learn.")] = REWARD_COLUMN,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = FIT_STEPS,
    every: Annotated[int, typer.Option(min=1, help="Steps between two measurements.")] = FIT_EVERY,
    held_out: Annotated[
        float,
        typer.Option(min=0.01, max=0.49, help="Share of the prompts to measure on."),
    ] = FIT_HELD_OUT,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET|CONFIG.toml",
            help="Settings. Default: the run's, with the contrast as the only objective.",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="Override a key, e.g. pool.num_quantiles=2."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for the model at its best step.", show_default=False),
    ] = None,
    allow: AllowOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Test on an existing pool whether a model can learn its reward, without generating or scoring.

    Some of the prompts are held out. On their samples the command measures, every few steps, how
    well the reward tokens tell good from bad, and says at the end whether that is better than
    chance and when to stop. The pool is only read.

    **Examples**

    * `quark fit runs/demo`

    * `quark fit samples --model ./my-model --score politeness --set pool.num_quantiles=2 --out fitted`
    """
    from quark.api.fitting import fitting
    from quark.cli.console import foreign, make_console, print_json, prints_to_stderr, prose
    from quark.cli.pool_path import opened
    from quark.errors import DataError
    from quark.training.fit import fit

    progress = make_console(sys.stderr)
    console = progress if as_json else make_console()
    with opened(path) as pool, prints_to_stderr():
        configured = fitting(
            path,
            model=model,
            source=config,
            overrides=set_ or (),
            steps=steps,
            held_out=held_out,
            allow=allow,
        )
        effective = configured.config

        def begin(found: Fit) -> None:
            console.print(foreign(_said_of(found, effective, score)), soft_wrap=True)
            console.print()
            console.print(prose(_HEAD, "bold"), soft_wrap=True)

        try:
            result = fit(
                pool,
                effective,
                score=score,
                every=every,
                out=out,
                is_rate_chosen=configured.is_rate_chosen,
                on_begin=begin,
                on_point=lambda point: console.print(prose(_line(point)), soft_wrap=True),
                on_message=lambda text: progress.print(
                    foreign(f"warning: {text}", style="yellow"), soft_wrap=True
                ),
            )
        except ValueError as err:
            raise DataError(f"{path} cannot be learned from: {err}") from err
    if as_json:
        print_json(_plain(path, effective, score, out, result))
        return
    console.print(prose(_NOTE.format(chance=result.chance), "dim"))
    console.print()
    console.print(prose(result.verdict, "green" if result.is_learned else "yellow"))
    if out is not None:
        said = f"{out}: the model after {result.best.step} steps"
        console.print(foreign(said, style="green"), soft_wrap=True)


_HEAD = "  step  learned from  held out   95 % interval   contrast  right  rank corr.  spread    KL"
_NOTE = (
    "learned from, held out: what the tokens say, in nats (chance 0); contrast: chance {chance:.3f}; right: share of "
    "held-out samples given their own quantile; rank corr.: of best over worst token with the reward; spread: of that "
    "ratio, in nats; KL: to the original model, nats per token"
)


def _line(point: FitPoint) -> str:
    from quark.cli.console import number

    found, interval = point.held_out, point.interval
    return (
        f"{point.step:6}  {number(point.train_information):>12}  {number(found.information):>8}"
        f"  {number(interval.low):>6} .. {number(interval.high):>6}  {number(found.contrast_loss):>9}"
        f"  {found.label_accuracy:>5.0%}  {number(found.rank_correlation, 2):>10}"
        f"  {number(found.ratio_std, 2):>6}  {number(point.drift):>5}"
    )


def _said_of(found: Fit, config: RunConfig, score: str) -> str:
    from quark.cli.console import counted

    return (
        f"learning {score} in {counted(found.num_quantiles, 'quantile')} from {counted(found.num_train, 'sample')}; "
        f"{counted(found.num_held_out, 'sample')} of {counted(found.num_held_out_prompts, 'other prompt')} held out "
        f"({config.model.name}, learning rate {found.learning_rate:g})"
    )


def _plain(
    path: Path, config: RunConfig, score: str, out: Path | None, result: Fit
) -> dict[str, Any]:
    return {
        "pool": path,
        "model": config.model.name,
        "score": score,
        "num_quantiles": result.num_quantiles,
        "train_samples": result.num_train,
        "held_out_samples": result.num_held_out,
        "held_out_prompts": result.num_held_out_prompts,
        "learning_rate": result.learning_rate,
        "chance": result.chance,
        "points": [dataclasses.asdict(point) for point in result.points],
        "best_step": result.best.step,
        "learned": result.is_learned,
        "verdict": result.verdict,
        "out": out,
    }
