"""Figures of several models side by side: a table for the terminal, Markdown and JSON; for `evaluate` and `compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from quark.evaluation.figures import Figure
    from quark.evaluation.frontier import Interval
    from quark.rewards.base import RewardFunction
    from quark.training.factories import Rewards

_SHOWN = (
    ("reward", "reward", 3),
    ("KL per text", "kl_sampled", 2),
    ("perplexity", "perplexity", 1),
    ("distinct-2", "distinct_2", 2),
    ("diversity", "diversity", 2),
    ("length", "tokens", 1),
)
"""Columns of the terminal's table; Markdown and JSON have every figure."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of one model."""

    name: str
    figures: Mapping[str, Figure]


def table(models: Sequence[Measured], judges: Sequence[str]) -> Table:
    """One row for each model: the main figures with half the width of their 95 % intervals."""
    return _grid(
        models, judges, {m.name: {k: f.interval for k, f in m.figures.items()} for m in models}
    )


def difference_table(models: Sequence[Measured], judges: Sequence[str]) -> Table:
    """One row for each model but the first: its paired differences from the first, bold where 0 is outside."""
    first, *others = models
    return _grid(
        others,
        judges,
        {m.name: {k: f.minus(first.figures[k]) for k, f in m.figures.items()} for m in others},
        is_difference=True,
    )


def _grid(
    models: Sequence[Measured],
    judges: Sequence[str],
    intervals: Mapping[str, Mapping[str, Interval]],
    *,
    is_difference: bool = False,
) -> Table:
    from quark.cli.console import foreign, grid

    shown = [_SHOWN[0], *((judge, judge, 3) for judge in judges), *_SHOWN[1:]]
    titles = [title for title, _, _ in shown]
    rows = grid(
        "minus the first" if is_difference else "model", *titles, right=range(1, 1 + len(titles))
    )
    for model in models:
        cells = [
            _cell(intervals[model.name][key], digits, is_difference=is_difference)
            for _, key, digits in shown
        ]
        rows.add_row(foreign(model.name), *cells)
    return rows


def _cell(interval: Interval, digits: int, *, is_difference: bool) -> Text:
    from quark.cli.console import number, prose

    spread = max(interval.high - interval.mean, interval.mean - interval.low)
    is_clear = is_difference and (interval.low > 0.0 or interval.high < 0.0)
    sign = "+" if is_difference and interval.mean > 0 else ""
    text = f"{sign}{number(interval.mean, digits)} ± {number(spread, digits)}"
    return prose(text, "bold" if is_clear else "")


def markdown(models: Sequence[Measured]) -> str:
    """Every figure as a row with its better direction, and a column for each model; then the paired differences."""
    arrows = {"higher": "↑", "lower": "↓", "neither": ""}
    names = [model.name.replace("|", "\\|") for model in models]
    lines = [f"| figure | | {' | '.join(names)} |", "| --- " * (2 + len(names)) + "|"]
    for key, figure in models[0].figures.items():
        cells = " | ".join(_bounds(model.figures[key].interval) for model in models)
        lines.append(f"| {key} | {arrows[figure.direction]} | {cells} |")
    if len(models) > 1:
        first = models[0]
        lines += ["", f"Paired differences from {names[0]}, with 95 % intervals over prompts:", ""]
        lines += [
            f"| figure | | {' | '.join(names[1:])} |",
            "| --- " * (1 + len(names)) + "|",
        ]
        for key, figure in first.figures.items():
            cells = " | ".join(
                _bounds(model.figures[key].minus(figure), sign="+") for model in models[1:]
            )
            lines.append(f"| {key} | {arrows[figure.direction]} | {cells} |")
    return "\n".join(lines)


def _bounds(interval: Interval, sign: str = "-") -> str:
    if interval.mean != interval.mean:
        return "–"
    return f"{interval.mean:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def to_json(model: Measured) -> dict[str, dict[str, Any]]:
    """Every figure of a model: its value, its interval and which way is better."""
    return {
        key: {**_json(figure.interval), "better": figure.direction.value}
        for key, figure in model.figures.items()
    }


def differences_to_json(model: Measured, first: Measured) -> dict[str, dict[str, float]]:
    """Every paired difference of a model from the first, with its interval."""
    return {key: _json(figure.minus(first.figures[key])) for key, figure in model.figures.items()}


def _json(interval: Interval) -> dict[str, float]:
    return {"value": interval.mean, "low": interval.low, "high": interval.high}


def scorers_to_json(rewards: Rewards) -> dict[str, dict[str, str | None]]:
    """The hash of every scorer by its name, where its content is known."""
    from quark.rewards.build import scorer_hash

    named: dict[str, RewardFunction] = {rewards.reward.name: rewards.reward, **rewards.judges}
    return {name: {"sha256": scorer_hash(reward)} for name, reward in named.items()}
