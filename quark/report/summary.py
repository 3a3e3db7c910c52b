"""What a run amounts to in a few lines: shown at the top of the report, in ``report.md`` and on the model's card."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quark.errors import QuarkError
from quark.report.load import Row, RunData, figure, number_in
from quark.safe_files import lines

_NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over held-out completions."""

    mean: float
    half_width: float
    """Of its 95 % interval; NaN where the spread is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One figure of the original model and of the trained one under the best token."""

    label: str
    before: Estimate
    after: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The run in short."""

    facts: Sequence[tuple[str, str]]
    """Name and value: model, reward, judges, date, duration, device, versions, sizes."""
    comparisons: Sequence[Comparison]
    num_prompts: int
    """Held-out prompts; 0 where it is not known."""
    control_curve: Sequence[float]
    """Mean reward by reward token, 0 lowest."""


def summarize(data: RunData) -> Summary:
    """The summary of a loaded run; what its files do not say is left out."""
    num_prompts = _num_held_out(data)
    curve = (data.last_curve or {}).get("reward_mean")
    return Summary(
        facts=_facts(data, num_prompts),
        comparisons=_comparisons(data, num_prompts),
        num_prompts=num_prompts,
        control_curve=[number_in(value) for value in curve] if isinstance(curve, list) else [],
    )


def _facts(data: RunData, num_prompts: int) -> list[tuple[str, str]]:
    evaluation, start = section(data, "evaluation"), data.runs[0] if data.runs else {}
    judges = evaluation.get("judges")
    versions = start.get("versions")
    device = str(start.get("device", ""))
    if isinstance(versions, dict) and versions.get("device"):
        device = str(versions["device"])
    found = [
        ("model", str(section(data, "model").get("name", ""))),
        ("reward", str(section(data, "reward").get("name", ""))),
        ("judges", ", ".join(map(str, judges)) if isinstance(judges, list) else ""),
        ("started", _day(figure(start, "unix_time"))),
        ("duration", _duration(figure(data.end, "seconds"))),
        ("device", device),
        ("quark", data.identity.quark_version or ""),
        ("rounds", str(len(data.rounds) or "")),
        ("held-out prompts", f"{num_prompts:,}" if num_prompts else ""),
    ]
    return [(name, value) for name, value in found if value]


def _comparisons(data: RunData, num_prompts: int) -> list[Comparison]:
    before, after = data.baseline, data.best_evaluations[-1] if data.best_evaluations else None
    if before is None or after is None:
        return []
    found = [_reward(before, after, num_prompts)]
    for label, key in (
        ("KL(sampled ‖ original), nats per token", "kl_sampled_to_reference"),
        ("KL(sampled ‖ original), nats per completion", "kl_sampled_per_completion"),
        ("perplexity under the original model", "perplexity_reference"),
        ("distinct-2", "distinct_2"),
        ("completion length, tokens", "completion_length_mean"),
    ):
        found.append(_plain(label, before.get(key), after.get(key)))
    ours, theirs = before.get("judges"), after.get("judges")
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found += [_plain(f"judge {name}", ours.get(name), theirs.get(name)) for name in theirs]
    return [each for each in found if math.isfinite(each.after.mean)]


def _reward(before: Row, after: Row, num_prompts: int) -> Comparison:
    # Completions of one prompt are alike, so that prompts are counted: the interval is rather too wide.
    parts = []
    for row in (before, after):
        spread = figure(row, "reward_std")
        half = _NORMAL_95 * spread / math.sqrt(num_prompts) if num_prompts else math.nan
        parts.append(Estimate(mean=figure(row, "reward_mean"), half_width=half))
    return Comparison(label="mean reward", before=parts[0], after=parts[1])


def _plain(label: str, before: object, after: object) -> Comparison:
    means = (Estimate(mean=number_in(value), half_width=math.nan) for value in (before, after))
    return Comparison(label=label, before=next(means), after=next(means))


def _num_held_out(data: RunData) -> int:
    with contextlib.suppress(OSError, QuarkError):
        return sum(1 for _ in lines(data.directory.held_out, data.directory.path))
    return 0


def section(data: RunData, name: str) -> dict[str, Any]:
    """A section of the run's configuration; empty where the file lacks it."""
    found = data.config.get(name)
    return found if isinstance(found, dict) else {}


def _day(unix_time: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_time))
    except (ValueError, OverflowError, OSError):  # missing, or beyond every calendar
        return ""


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )
