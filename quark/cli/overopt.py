"""``quark overopt``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quark.pool.columns import GOLD_COLUMN, REWARD_COLUMN

if TYPE_CHECKING:
    from rich.table import Table

    from quark.evaluation.overoptimization import Curve, Fit, Interval
    from quark.report.overopt import Overopt


def overopt(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|POOL|TABLE.jsonl",
            help="A run, a pool, or JSON lines with `prompt` and two scores.",
            show_default=False,
        ),
    ],
    proxy: Annotated[str, typer.Option(help="Score column that is optimized.")] = REWARD_COLUMN,
    gold: Annotated[
        str, typer.Option(help="Score column, and judge of the evaluations, that is the truth.")
    ] = GOLD_COLUMN,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the curves.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Show whether more of the reward is still more of the truth, and where it stops to be.

    Best-of-n is estimated from the original model's samples: those of a pool's first round, or all of a
    table. The curve of a run's checkpoints comes from its evaluations. Both need a gold reward (`pool.gold`).
    Nothing is generated or scored.

    **Examples**

    * `quark overopt runs/noisy --picture overopt.svg`

    * `quark overopt scored.jsonl --proxy reward --gold human`
    """
    import dataclasses

    from quark.cli.console import make_console, print_json, prose
    from quark.publication import publish_file
    from quark.report.overopt_chart import picture as drawn

    found = _found(source, proxy=proxy, gold=gold)
    if picture is not None:
        publish_file(picture, drawn(found), is_durable=False)
    if as_json:
        print_json(
            {
                **dataclasses.asdict(found),
                "advice": list(found.advice),
                "picture": None if picture is None else str(picture),
            }
        )
        return
    console = make_console()
    for curve, title in (
        (found.best_of_n, f"best of n, {found.num_prompts} prompts"),
        (found.training, "checkpoints, from the best quantile"),
    ):
        if curve is None:
            continue
        console.print(prose(title, "bold"))
        console.print(_table(curve))
        console.print(prose(_fit_line(curve.fit), "dim"), soft_wrap=True)
        console.print()
    if found.num_left_out and found.best_of_n is not None:
        console.print(
            prose(f"{found.num_left_out} prompts have too few samples with both scores", "dim")
        )
    for line in found.advice:
        console.print(prose(line), soft_wrap=True)


def _found(source: Path, *, proxy: str, gold: str) -> Overopt:
    """What there is in a run, a pool or a table.

    Raises:
        ConfigError: there is nothing to draw a curve from.
        DataError: a table's line is no row.
    """
    from quark.cli.pool_path import opened
    from quark.errors import ConfigError
    from quark.report.load import load_run
    from quark.report.overopt import found_in, of_run, prompts_of_pool, prompts_of_table
    from quark.run_directory import RunDirectory

    if source.is_file():
        prompts, left_out = prompts_of_table(source, proxy=proxy, gold=gold)
        if not prompts:
            raise ConfigError(f"{source}: no prompt has 4 samples with both scores")
        return found_in(prompts, left_out, (None, (), None))
    run = of_run(load_run(source), gold) if RunDirectory(source).is_run() else (None, (), None)
    with opened(source) as pool:
        missing = [name for name in (proxy, gold) if name not in pool.score_columns]
        prompts, left_out = ([], 0) if missing else prompts_of_pool(pool, proxy=proxy, gold=gold)
        there = ", ".join(pool.score_columns) or "none"
    if not prompts and run[0] is None:
        if missing:
            raise ConfigError(
                f"{source} has no score column {missing[0]!r} (it has: {there}) and no evaluations with such a judge. "
                f"Name another with --proxy or --gold, set pool.gold in a run, or score the pool: "
                f"quark pool rescore {source} REWARD --as {gold}"
            )
        raise ConfigError(
            f"{source} has no prompt with 4 samples of the original model that have both scores: explore with "
            "run.completions_per_prompt = 16, say"
        )
    return found_in(prompts, left_out, run)


def _table(curve: Curve) -> Table:
    from quark.cli.console import grid, number
    from quark.evaluation.overoptimization import Form

    is_best_of_n = curve.form is Form.BEST_OF_N
    titles = ["n" if is_best_of_n else "step", "KL", "distance", "proxy", "gold"]
    if is_best_of_n:
        titles.append("rests on samples")
    table = grid(*titles, right=range(len(titles)))
    for point in curve.points:
        values = [number(point.kl), number(point.distance), number(point.proxy), number(point.gold)]
        if is_best_of_n:
            values.append(number(point.effective, 1))
        table.add_row(str(point.label), *values)
    return table


def _fit_line(fit: Fit | None) -> str:
    from quark.evaluation.overoptimization import Form

    if fit is None:
        return "too few points for a fit"
    form = "d (alpha - beta d)" if fit.form is Form.BEST_OF_N else "d (alpha - beta log d)"
    said = f"gold gain = {form}: alpha {_said(fit.alpha)}, beta {_said(fit.beta)}; "
    if fit.peak_distance is None or fit.peak_gain is None:
        said += "no peak"
    else:
        said += f"peak at distance {_said(fit.peak_distance)} with gain {_said(fit.peak_gain)}"
        if fit.is_extrapolated:
            said += ", extrapolated: beyond the distances that were measured"
    return f"{said}; error of extrapolating from the lower half {fit.extrapolation_error:.3g}"


def _said(interval: Interval) -> str:
    return f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"
