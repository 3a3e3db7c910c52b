"""``quark pool``: inspect a sample pool, even while a run writes to it.

Further commands have files of their own.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quark.cli import (
    pool_compact,
    pool_create,
    pool_explain,
    pool_export,
    pool_fork,
    pool_gc,
    pool_import,
    pool_merge,
    pool_query,
    pool_rescore,
    pool_retain,
)
from quark.cli.exit_codes import ExitCode
from quark.cli.pool_path import JsonFlag, PoolPath, opened, pool_path
from quark.pool.columns import REWARD_COLUMN
from quark.pool.defaults import MAX_QUANTILES, NUM_QUANTILES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console

    from quark.pool.native import NativePool
    from quark.pool.ranking import RankingRules
    from quark.pool.statistics import HistogramBin, RoundMean, ScoreStatistics

app = typer.Typer(
    help="Inspect sample pools, export and import samples. Reading never disturbs a run.",
    no_args_is_help=True,
)

NumQuantiles = Annotated[
    int | None,
    typer.Option(
        "--num-quantiles",
        "-k",
        min=1,
        max=MAX_QUANTILES,
        help=f"Cut into this many. Default: the run's, or {NUM_QUANTILES}.",
        show_default=False,
    ),
]

ScoreColumn = Annotated[
    str | None,
    typer.Option(
        "--score",
        help=f"Score column to rank by. Default: what the run ranks by, or {REWARD_COLUMN}.",
        show_default=False,
    ),
]


@app.command()
def info(path: PoolPath, as_json: JsonFlag = False) -> None:
    """Show the number of samples in a pool, its scores and its size."""
    from quark.cli.console import (
        count,
        counted,
        figures,
        foreign,
        make_console,
        number,
        print_json,
        size,
    )

    with opened(path) as pool:
        facts = pool.info()
    if as_json:
        columns = {
            column.name: {
                key: value for key, value in dataclasses.asdict(column).items() if key != "name"
            }
            for column in facts.score_columns
        }
        print_json(
            {
                "path": facts.path,
                "uuid": facts.uuid,
                "samples": facts.snapshot.num_samples,
                "removed": facts.num_removed,
                "prompts": facts.num_prompts,
                "snapshot": dataclasses.asdict(facts.snapshot),
                "score_columns": columns,
                "drafts": [dataclasses.asdict(draft) for draft in facts.drafts],
                "segments": facts.num_segments,
                "bytes": facts.num_bytes,
                "vocab_size": facts.vocab_size,
                "store_text": facts.store_text,
                "metadata": facts.metadata,
            }
        )
        return
    samples = count(facts.num_retained)
    if facts.num_removed:
        samples += f", and {count(facts.num_removed)} older ones that were removed"
    rows: list[tuple[str, Any]] = [
        ("pool", foreign(str(facts.path))),
        ("samples", samples),
        ("prompts", count(facts.num_prompts)),
        ("snapshot", f"{facts.snapshot.generation} ({facts.snapshot.hash[:16]})"),
        ("size", f"{size(facts.num_bytes)} in {counted(facts.num_segments, 'segment')}"),
        ("vocabulary", f"{count(facts.vocab_size)} tokens"),
    ]
    for column in facts.score_columns:
        text = (
            f"mean {number(column.mean)}, {number(column.min)} .. {number(column.max)}, "
            f"{count(column.num_unscored)} not scored"
        )
        if column.version > 1 or column.source:
            text += (
                f"; version {column.version}, by {column.source.get('name', 'an unnamed reward')}"
            )
        rows.append((f"score {column.name}", foreign(text)))
    for draft in facts.drafts:
        done = f"{count(draft.num_covered)} of {count(facts.num_retained)} samples"
        rows.append((f"score {draft.name}", foreign(f"being written anew: {done}")))
    rows += [(str(key), foreign(str(value), limit=200)) for key, value in facts.metadata.items()]
    make_console().print(figures(rows))


@app.command()
def head(
    path: PoolPath,
    quantile: Annotated[
        int | None, typer.Option("--quantile", "-q", help="Only this quantile; 0 is the lowest.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The highest scores first.")] = False,
    worst: Annotated[bool, typer.Option("--worst", help="The lowest scores first.")] = False,
    snapshot: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Show this older state of the pool. Default: the newest.",
            show_default=False,
        ),
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Samples to show.")] = 10,
    num_quantiles: NumQuantiles = None,
    score: ScoreColumn = None,
    as_json: JsonFlag = False,
) -> None:
    """Show samples: the first ones, the best or worst ones, or those of one quantile.

    The pool of a run is ranked by the run's rules. `–` marks samples that they leave out.

    **Examples**

    * `quark pool head runs/demo --best`

    * `quark pool head runs/demo --quantile 0 --num 3`
    """
    import numpy as np

    from quark.cli.console import completed, foreign, grid, make_console, number, print_json, prose
    from quark.pool.recorded_ranking import rank_by_recorded

    if best and worst:
        raise typer.BadParameter("--best and --worst exclude each other")
    rules = asked_rules(path, num_quantiles, score)
    if quantile is not None and not 0 <= quantile < rules.num_quantiles:
        raise typer.BadParameter(f"--quantile {quantile} is not in 0 .. {rules.num_quantiles - 1}")
    with opened(path, snapshot) as pool:
        scores, labels = np.empty(0, np.float32), np.full(len(pool), -1)
        if best or worst or quantile is not None or has_ranking(pool, rules):
            scores = ranking_values(pool, rules)
            labels = rank_by_recorded(pool, rules).labels()
        ids = np.arange(pool.num_removed, len(pool))
        if quantile is not None:
            ids = np.flatnonzero(labels == quantile)
        if best or worst:
            ids = ids[~np.isnan(scores[ids])]
            ids = ids[np.argsort(-scores[ids] if best else scores[ids], kind="stable")]
        samples = pool.samples([int(sample_id) for sample_id in ids[:num]])
    if as_json:
        print_json(
            {
                "samples": [
                    {
                        "id": sample.id,
                        "quantile": int(labels[sample.id]),
                        "round": sample.round,
                        "reward_token": sample.reward_token,
                        "prompt": sample.prompt_text,
                        "completion": sample.completion_text,
                        "scores": dict(sample.scores),
                        "logprob_policy": sample.logprob_policy,
                        "logprob_reference": sample.logprob_reference,
                        "logprob_sampled": sample.logprob_sampled,
                    }
                    for sample in samples
                ]
            }
        )
        return
    names = ("id", "round", "quantile", ranking_name(rules), "prompt", "completion")
    table = grid(*names, right=(0, 1, 2, 3), wide=(4, 5))
    table.columns[5].ratio = 2
    for sample in samples:
        label, text = int(labels[sample.id]), sample.completion_text
        table.add_row(
            prose(str(sample.id), "dim"),
            prose(str(sample.round), "dim"),
            prose("–" if label < 0 else str(label)),
            prose(number(float(scores[sample.id]) if len(scores) else math.nan)),
            foreign(sample.prompt_text, limit=200, style="dim"),
            foreign("") if text is None else completed(text, limit=400),
        )
    make_console().print(table)


@app.command()
def stats(
    path: PoolPath,
    num_quantiles: NumQuantiles = None,
    score: ScoreColumn = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the scores: spread, ties, histogram, quantile cuts, means by round.

    The pool of a run is cut by the run's rules.
    """
    figures = _figures(path, asked_rules(path, num_quantiles, score))
    if as_json:
        from quark.cli.console import print_json

        print_json(figures.plain())
    else:
        _show(figures)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """The result of ``pool stats``."""

    rules: RankingRules
    is_ranked: bool
    """Whether the pool has the scores to rank by."""
    num_samples: int
    num_removed: int
    columns: dict[str, ScoreStatistics]
    counts: list[int]
    """[K] by quantile, like ``lower_bounds``."""
    lower_bounds: list[float]
    tie_share: float
    bins: tuple[HistogramBin, ...]
    rounds: tuple[RoundMean, ...]

    def plain(self) -> dict[str, object]:
        """The statistics for ``--json``."""
        return {
            "samples": self.num_samples,
            "removed": self.num_removed,
            "columns": {name: _plain(column) for name, column in self.columns.items()},
            "score": ranking_name(self.rules) if self.is_ranked else None,
            "quantile_counts": self.counts,
            "quantile_lower_bounds": self.lower_bounds,
            "tie_share": self.tie_share,
            "histogram": [
                {"low": each.low, "high": each.high, "samples": each.num_samples}
                for each in self.bins
            ],
            "rounds": [
                {"round": each.round, "samples": each.num_samples, "mean": each.mean}
                for each in self.rounds
            ],
        }


def _figures(path: Path, rules: RankingRules) -> _Figures:
    import numpy as np

    from quark.pool.recorded_ranking import rank_by_recorded
    from quark.pool.statistics import describe, histogram, round_means

    with opened(path) as pool:
        removed = pool.num_removed
        is_ranked = has_ranking(pool, rules)
        scores = (
            ranking_values(pool, rules)[removed:]
            if is_ranked
            else np.full(len(pool) - removed, np.nan, np.float32)
        )
        cuts = rank_by_recorded(pool, rules) if is_ranked else None
        return _Figures(
            rules=rules,
            is_ranked=is_ranked,
            num_samples=len(scores),
            num_removed=removed,
            columns={name: describe(pool.scores(name)[removed:]) for name in pool.score_columns},
            counts=[0] * rules.num_quantiles if cuts is None else cuts.counts.tolist(),
            lower_bounds=[math.nan] * rules.num_quantiles
            if cuts is None
            else cuts.lower_bounds.tolist(),
            tie_share=0.0 if cuts is None else rules.tie_share(pool, cuts),
            bins=histogram(scores),
            rounds=round_means(pool.column("round")[removed:], scores),
        )


def _show(figures: _Figures) -> None:
    from quark.cli.console import count, foreign, grid, make_console, number, prose

    console = make_console()
    names = ("mean", "std", "min", "median", "max")
    table = grid("score", "samples", *names, "not scored", "repeated", right=range(1, 9))
    for name, statistics in figures.columns.items():
        table.add_row(
            foreign(name, limit=64),
            prose(count(statistics.num_samples)),
            *(prose(number(getattr(statistics, key))) for key in names),
            prose(count(statistics.num_unscored)),
            prose(f"{statistics.repeated_share:.0%}"),
        )
    console.print(table)
    console.print()
    if figures.is_ranked:
        _show_ranking(figures, console)
    else:
        text = f"no score {ranking_name(figures.rules)}: --score NAME ranks by another"
        console.print(prose(text, "yellow"))
    console.print()
    _show_rounds(figures.rounds, console)


def _show_ranking(figures: _Figures, console: Console) -> None:
    """Histogram and quantiles."""
    from quark.cli.console import bar, count, grid, heading, number, prose

    score = ranking_name(figures.rules)
    most = max((each.num_samples for each in figures.bins), default=0)
    console.print(heading(f"Histogram of {score}"))
    lines = grid("from", "to", "samples", "", right=(0, 1, 2))
    for each in figures.bins:
        lines.add_row(
            prose(number(each.low)),
            prose(number(each.high)),
            prose(count(each.num_samples)),
            prose(bar(each.num_samples, 0, most, console.width - 40), "cyan"),
        )
    console.print(lines)
    console.print()
    console.print(heading(f"{figures.rules.num_quantiles} quantiles (0 lowest)"))
    table = grid("quantile", "samples", "lowest " + score, right=(0, 1, 2))
    for index in reversed(range(figures.rules.num_quantiles)):
        table.add_row(
            prose(str(index)),
            prose(count(figures.counts[index])),
            prose(number(figures.lower_bounds[index])),
        )
    console.print(table)
    if figures.tie_share:
        text = (
            f"the tie rule chose the quantile of {figures.tie_share:.0%} of the ranked samples: "
            "their score is in several"
        )
        console.print(prose(text, "yellow"), soft_wrap=True)


def _show_rounds(rounds: tuple[RoundMean, ...], console: Console) -> None:
    from quark.cli.console import bar, count, grid, heading, number, prose

    console.print(heading("By round"))
    table = grid("round", "samples", "mean", "", right=(0, 1, 2))
    means = [row.mean for row in rounds if math.isfinite(row.mean)]
    low, high = min([*means, 0.0]), max([*means, 0.0])
    for row in rounds:
        table.add_row(
            prose(str(row.round)),
            prose(count(row.num_samples)),
            prose(number(row.mean)),
            prose(bar(row.mean, low, high, console.width - 40), "cyan"),
        )
    console.print(table)


@app.command()
def verify(path: PoolPath, as_json: JsonFlag = False) -> None:
    """Check every byte of a pool. The exit status is 4 if something is damaged."""
    from quark.cli.console import count, counted, foreign, make_console, print_json, prose, size
    from quark.pool.native import NativePool

    report = NativePool.verify(pool_path(path))
    if as_json:
        print_json({"sound": report.is_sound, **dataclasses.asdict(report)})
    else:
        console = make_console()
        read = f"read {size(report.num_bytes)} in {count(report.num_files)} files"
        if report.is_sound:
            console.print(prose(f"sound: {count(report.num_samples)} samples, {read}", "green"))
        for problem in report.problems:
            where = f"{problem.file} at byte {count(problem.offset)}: " if problem.file else ""
            console.print(foreign(f"damaged: {where}{problem.what}", style="red"), soft_wrap=True)
        if not report.is_sound:
            console.print(prose(f"{counted(len(report.problems), 'problem')}; {read}", "bold red"))
    if not report.is_sound:
        raise typer.Exit(ExitCode.STATE)


app.command("explain")(pool_explain.explain)
app.command("query")(pool_query.query)
app.command("create")(pool_create.create)
app.command("rescore")(pool_rescore.rescore)
app.command("export")(pool_export.export)
app.command("import")(pool_import.import_)
app.command("merge")(pool_merge.merge)
app.command("fork")(pool_fork.fork)
app.command("compact")(pool_compact.compact)
app.command("retain")(pool_retain.retain)
app.command("gc")(pool_gc.gc)


def run_rules(path: Path) -> RankingRules:
    """The ranking rules of the run at ``path``, or of the run whose pool it is; the defaults without a run."""
    from quark.pool.ranking import RankingRules
    from quark.pool.recorded_ranking import recorded_rules
    from quark.report.load import read_config
    from quark.run_directory import RunDirectory

    run = RunDirectory.around(path)
    return (
        recorded_rules(read_config(run.config), run.standards) if run.is_run() else RankingRules()
    )


def asked_rules(path: Path, num_quantiles: int | None, score: str | None) -> RankingRules:
    """``run_rules``, overridden by the command line."""
    rules = run_rules(path)
    if score is not None:
        rules = dataclasses.replace(rules, score=score, ensemble=None)
    return dataclasses.replace(rules, num_quantiles=num_quantiles or rules.num_quantiles)


def ranking_name(rules: RankingRules) -> str:
    """What to call the values that these rules rank by."""
    return rules.score if rules.ensemble is None else "ensemble"


def ranking_values(pool: NativePool, rules: RankingRules) -> NDArray[np.float32]:
    """[N] what the rules rank by. Raises ConfigError with the names of the existing columns."""
    for name in (rules.score,) if rules.ensemble is None else rules.ensemble.columns:
        column(pool, name)
    return rules.values(pool)


def column(pool: NativePool, name: str) -> NDArray[np.float32]:
    """A score column. Raises ConfigError with the names of the existing columns."""
    from quark.errors import ConfigError

    if name not in pool.score_columns:
        there = ", ".join(pool.score_columns) or "none"
        raise ConfigError(f"the pool has no score column {name!r} (it has: {there})")
    return pool.scores(name)


def has_ranking(pool: NativePool, rules: RankingRules) -> bool:
    """Whether to rank: always, except by the default column if the pool lacks it.

    A pool may have other scores, or none.
    """
    return ranking_name(rules) != REWARD_COLUMN or REWARD_COLUMN in pool.score_columns


def _plain(statistics: ScoreStatistics) -> dict[str, float]:
    """Statistics of a score column under the names of the JSON output."""
    fields = dataclasses.asdict(statistics)
    names = {"num_samples": "samples", "num_unscored": "nan", "num_infinite": "infinite"}
    return {names.get(name, name): value for name, value in fields.items()}
