"""A loaded run as one HTML file.

Everything that came from a model, a file or a user passes ``printable`` and Jinja's autoescape; the page
has no script, loads nothing, and says so in its content security policy.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from quark import __version__
from quark.evaluation.metrics import is_better
from quark.printable import printable
from quark.publication import publish_file
from quark.report import charts
from quark.report.load import RunData, figure, load_run, number_in
from quark.report.markdown import report_markdown
from quark.report.summary import summarize
from quark.run_directory import RunDirectory
from quark.safe_files import is_contained

_SHOWN_CHARACTERS = 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One large figure at the top of the page."""

    name: str
    value: str
    note: str
    is_good: bool | None = None
    """Whether it is painted as a gain or as a loss; None for neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One value of the configuration."""

    key: str
    value: str
    origin: str


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the report of a run and return its path; the file appears whole or not at all.

    The figures are written beside it as Markdown, too (``report.md``).

    Args:
        run_dir: a run directory, finished or not.
        output: where to write; ``report.html`` in the run directory when None.

    Raises:
        RunDirectoryError: ``run_dir`` is not a run directory or is damaged.
        UnsafeFileError: a file of it is a link out of it, or not a plain file.
        OSError: the file cannot be written.
    """
    path = RunDirectory(run_dir).report if output is None else output
    data = load_run(run_dir)
    page = render_report(data, relative_to=path.parent)
    publish_file(path, page)
    publish_file(markdown_beside(path), report_markdown(data))
    return path


def markdown_beside(page: Path) -> Path:
    """Where the Markdown of a page goes: the same name, ending in ``.md``."""
    return page.with_name(f"{page.name.removesuffix('.html')}.md")


def render_report(data: RunData, *, relative_to: Path) -> str:
    """The page as text; links are relative to the folder ``relative_to``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("quark.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        shown=lambda text: printable(str(text), limit=_SHOWN_CHARACTERS),
        completed=_completed,
        num=number,
        count=lambda value: f"{value:,}",
    )
    return environment.get_template("report.html").render(
        name=data.directory.path.resolve().name,
        data=data,
        state=_state(data),
        summary=summarize(data),
        headlines=_headlines(data),
        examples=_examples(data),
        charts=_charts(data),
        histogram=charts.reward_histogram(data.pool) if data.pool else None,
        color=lambda index: charts.quantile_color(index, data.num_quantiles),
        settings=list(_settings(data)),
        facts=_facts(data),
        links=list(_links(data.directory, relative_to)),
        version=__version__,
    )


def _completed(text: object) -> str:
    """A completion, or a mark where there is nothing to see."""
    shown = str(text)
    if not shown.strip():
        return " (blank)" if shown else " (empty)"
    return printable(shown, limit=_SHOWN_CHARACTERS)


def number(value: object, digits: int = 3) -> str:
    """A figure for people; anything that is not a finite number is a dash."""
    figure = number_in(value)
    if math.isnan(figure):
        return "–"
    return f"{figure:.{digits}f}" if figure == 0 or abs(figure) >= 10**-digits else f"{figure:.2g}"


def _state(data: RunData) -> str:
    """How far the run is, as well as its directory can tell."""
    if data.end is not None:
        return "finished"
    last = f"the last row of its log is of {_moment(data.last_written)}"
    if data.is_written:
        return f"running: a process has its pool open; {last}"
    if data.stop is not None:
        where = f"in round {data.stop.get('round')} after {data.stop.get('step')} steps"
        if data.stop.get("kind") == "interrupted":
            return f"interrupted {where}, can be resumed"
        return f"failed {where}: {data.stop.get('reason')}"
    if data.is_written is None:
        return f"unfinished: running, or stopped without a word; {last}"
    return f"stopped without a word, as a killed process does; {last}"


def _moment(unix_time: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_time))
    except (ValueError, OverflowError, OSError):  # missing, or beyond every calendar
        return "an unknown time"


def _headlines(data: RunData) -> list[Headline]:
    best = data.best_evaluations[-1] if data.best_evaluations else None
    before = figure(data.end, "reward_before")
    after = figure(data.end, "reward_after")
    before = before if math.isfinite(before) else figure(data.baseline, "reward_mean")
    after = after if math.isfinite(after) else figure(best, "reward_mean")
    kl = figure(best, "kl_sampled_to_reference")
    if not math.isfinite(kl):
        kl = figure(data.end, "kl_policy_to_reference")
    if not math.isfinite(kl):
        kl = figure(data.steps[-1] if data.steps else None, "kl_policy_to_reference")
    lines = [
        Headline(
            name="Reward",
            value=f"{number(before, 2)} → {number(after, 2)}",
            note="held-out prompts: original model → best quantile",
            is_good=is_better("reward_mean", before, after),
        ),
        Headline(
            name="KL to the original", value=number(kl), note="nats per token, of what is sampled"
        ),
    ]
    distinct_before, distinct_after = (
        figure(data.baseline, "distinct_2"),
        figure(best, "distinct_2"),
    )
    if math.isfinite(distinct_after):
        value = f"{number(distinct_before, 2)} → {number(distinct_after, 2)}"
        lines.append(Headline(name="Distinct-2", value=value, note="share of distinct word pairs"))
    samples = figure(data.end, "samples")
    if data.pool is not None:
        samples = float(len(data.pool.rewards))
    elif not math.isfinite(samples):
        samples = figure(data.last_round, "samples")
    shown = f"{int(samples):,}" if math.isfinite(samples) else "–"
    lines.append(
        Headline(name="Samples", value=shown, note=f"in the pool, {len(data.rounds)} rounds")
    )
    return lines


def _examples(data: RunData) -> list[Mapping[str, object]]:
    pairs = (data.end or {}).get("before_after")
    keys = {"prompt", "before", "before_reward", "after", "after_reward"}
    if not isinstance(pairs, list):
        return []
    return [pair for pair in pairs if isinstance(pair, dict) and keys <= pair.keys()]


def _charts(data: RunData) -> list[charts.Chart]:
    drawn = (
        charts.reward_by_round(data),
        charts.control_curve(data),
        charts.reward_against_drift(data),
        charts.kl_by_step(data),
        charts.loss_by_step(data),
        charts.information_by_step(data),
        charts.control_gap_by_round(data),
        charts.diversity_by_round(data),
        charts.length_by_round(data),
        charts.entropy_by_step(data),
        charts.gradient_norm_by_step(data),
        charts.time_by_round(data),
        charts.perplexity_by_round(data),
    )
    return [chart for chart in drawn if chart is not None]


def _settings(data: RunData) -> Iterator[Setting]:
    origins = data.identity.origins

    def walk(prefix: str, value: object) -> Iterator[Setting]:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield Setting(key=prefix, value=text, origin=origins.get(prefix, ""))

    yield from walk("", dict(data.config))


def _facts(data: RunData) -> list[tuple[str, str]]:
    said = data.identity.to_json()
    facts: list[tuple[str, object]] = [item for item in said.items() if item[0] != "origins"]
    for row in data.runs[-1:]:
        facts += [(str(key), row[key]) for key in row if key not in ("event", "step", "unix_time")]
    flat: dict[str, str] = {}
    for key, value in facts:
        if isinstance(value, dict):
            flat.update({str(name): str(item) for name, item in value.items()})
        elif value is not None:
            flat[key] = str(value)
    return list(flat.items())


def _links(directory: RunDirectory, relative_to: Path) -> Iterator[tuple[str, str]]:
    for title, path in (
        ("model, loadable with plain transformers", directory.model),
        ("sample pool", directory.pool),
        ("configuration", directory.config),
        ("metrics, one JSON object a line", directory.metrics),
        ("what the run resumes from", directory.checkpoints),
    ):
        if is_contained(path, directory.path) and path.exists():
            target = os.path.relpath(path.resolve(), relative_to.resolve()).replace(os.sep, "/")
            yield f"{path.name}: {title}", quote(target) + ("/" if path.is_dir() else "")
