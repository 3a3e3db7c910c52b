"""``quark frontier``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quark.cli.checkpoint_option import CheckpointOption
from quark.cli.trust import AllowOption

if TYPE_CHECKING:
    from rich.table import Table

    from quark.evaluation.frontier import Interval, Point


def frontier(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    guidance: Annotated[
        str | None,
        typer.Option(
            metavar="G,G,...",
            help="Strengths of guidance to measure from the best quantile. Default: 0,0.25,0.5,1,2 by tokens, "
            "0,1,2,3,4,6 by the critic.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with prompts. Default: the run's held-out ones.")
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="Reward to measure; repeat it to add judges. Default: the run's."),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option("--num", "-n", min=1, help="Completions per prompt. Default: the run's."),
    ] = None,
    pick: Annotated[
        str | None,
        typer.Option(
            metavar="kl<=NATS",
            help="Keep the strength of highest reward within this drift per completion as the run's own: "
            "`quark generate` takes it from then on.",
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    allow: AllowOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Measure the reward and the drift of a trained model, for every token and several strengths of guidance.

    Drift is KL(sampled || original) in nats per completion. The result is kept in the run, and
    `quark report` draws it. Intervals are 95 % over prompts.

    **Examples**

    * `quark frontier runs/demo`

    * `quark frontier runs/demo --guidance 0,0.1,0.2,0.4 --pick "kl<=3"`
    """
    from quark.api.frontier import measure_frontier
    from quark.api.measurement import Measurement, check_run, configured
    from quark.api.trained_model import open_model, say_checkpoint
    from quark.cli.console import make_console, print_json, prints_to_stderr, prose, tell
    from quark.errors import ConfigError
    from quark.run_directory import RunDirectory

    strengths = None if guidance is None else _strengths(guidance)
    most_drift = None if pick is None else _most_drift(pick)
    source = open_model(run, exactly=True, checkpoint=checkpoint, allow=allow or ())
    say_checkpoint(source, tell)
    if not source.is_run or source.policy is None:
        raise ConfigError(f"{run} is not a run directory, whose reward tokens a frontier compares")
    config = configured(source, rewards=reward or (), reference=None, num=num, seed=None)
    check_run(source, config, prompts=prompts, rewards=reward, reference=None, allow=allow)
    best = source.num_quantiles - 1
    with prints_to_stderr():
        measurement = Measurement.of(source, config, prompts, tell=tell)
        kept, picked = measure_frontier(measurement, RunDirectory(Path(run)), strengths, most_drift)
    points = kept.points
    if most_drift is not None and picked is None:
        least = min(point.drift.mean for point in points if point.quantile == best)
        raise ConfigError(
            f'--pick "{pick}": every strength drifts farther; the least is {least:.2f} nats per completion. '
            f"The curve is kept, and `quark report {run}` draws it"
        )
    if as_json:
        print_json({"run": run, **kept.to_json()})
        return
    console = make_console()
    console.print(_table(points, best, tuple(config.evaluation.judges), picked))
    note = "drift: KL(sampled || original), nats per completion; ±: 95 % over prompts"
    console.print(prose(note, "dim"), soft_wrap=True)
    if picked is not None:
        text = f"`quark generate {run}` takes guidance {picked.guidance:g} from now on"
        console.print(prose(text, "green"), soft_wrap=True)


def _strengths(text: str) -> list[float]:
    from quark.errors import ConfigError

    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = [-1.0]
    if not all(0.0 <= strength < float("inf") for strength in found):
        raise ConfigError(f"--guidance {text}: give numbers from 0 upward with commas between them")
    return found


def _most_drift(text: str) -> float:
    from quark.errors import ConfigError

    match = re.fullmatch(r"\s*kl\s*<=?\s*([0-9]+(?:\.[0-9]*)?)\s*", text)
    if match is None:
        raise ConfigError(f'--pick {text}: write "kl<=3" for at most 3 nats per completion')
    return float(match[1])


def _table(
    points: Sequence[Point], best: int, judges: tuple[str, ...], picked: Point | None
) -> Table:
    from quark.cli.console import foreign, grid, number, prose

    titles = ("guidance", "reward", "drift", *judges)
    table = grid(
        "quantile", *titles, "perplexity", "distinct-2", "length", right=range(1, 7 + len(judges))
    )
    for point in points:
        name = "original" if point.quantile is None else str(point.quantile)
        name += " (best)" if point.quantile == best else " (worst)" if point.quantile == 0 else ""
        style = "bold green" if point is picked else "dim" if point.quantile is None else ""
        table.add_row(
            prose(name, style),
            prose(f"{point.guidance:g}", style),
            _interval(point.reward, 3),
            _interval(point.drift, 2),
            *(foreign(number(point.judges[judge].mean, 3)) for judge in judges),
            prose(number(point.perplexity, 1)),
            prose(number(point.distinct_2, 2)),
            prose(number(point.length, 1)),
        )
    return table


def _interval(interval: Interval, digits: int) -> Any:  # noqa: ANN401 - a rich text, imported late
    from quark.cli.console import number, prose

    spread = max(interval.high - interval.mean, interval.mean - interval.low)
    return prose(f"{number(interval.mean, digits)} ± {number(spread, digits)}")
