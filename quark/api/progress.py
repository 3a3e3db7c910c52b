"""Shows a training that was started from Python: lines on stderr, or one live box in a notebook."""

from __future__ import annotations

import html
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from quark.printable import printable
from quark.training.events import Progress, RoundSummary, Silence, TrainingListener

_COLUMNS = (
    ("reward", ("reward_mean",)),
    ("held-out reward", ("evaluation_reward_mean",)),
    ("KL per token", ("evaluation_kl_sampled_to_reference", "kl_policy_to_reference_mean")),
    ("samples", ("samples",)),
)
_HEARTBEAT_S = 10.0
_REFRESH_S = 0.25


def make_listener(*, is_quiet: bool) -> TrainingListener:
    """The listener that fits where this process runs."""
    if is_quiet:
        return Silence()
    show = _notebook_display()
    return PlainListener() if show is None else NotebookListener(show)


class PlainListener:
    """Writes a line for each message and each round, and one every ten seconds in between."""

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        self._write = write or (lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
        self._last = time.monotonic()

    def on_message(self, text: str, *, level: Literal["info", "warning"] = "info") -> None:
        """Write the message."""
        self._say(f"warning: {text}" if level == "warning" else text)

    def on_progress(self, progress: Progress) -> None:
        """Write the phase if nothing was written for ten seconds."""
        if time.monotonic() - self._last >= _HEARTBEAT_S:
            self._say(_phase(progress))

    def on_round(self, summary: RoundSummary) -> None:
        """Write the figures of the round."""
        shown = [f"{label} {value}" for label, value in _figures(summary.metrics) if value]
        self._say(", ".join([f"round {summary.round} of {summary.num_rounds}", *shown]))

    def _say(self, line: str) -> None:
        self._last = time.monotonic()
        self._write("\n".join(printable(part) for part in line.split("\n")))


class NotebookListener:
    """Keeps one box of HTML up to date: a bar for the phase, a row for each round, and the newest messages.

    Args:
        show: gets the box's HTML whenever it has changed.
    """

    def __init__(self, show: Callable[[str], object]) -> None:
        self._show = show
        self._messages: list[tuple[str, str]] = []
        self._rounds: list[RoundSummary] = []
        self._progress: Progress | None = None
        self._shown = 0.0

    def on_message(self, text: str, *, level: Literal["info", "warning"] = "info") -> None:
        """Show the message; warnings stay, of the others only the newest."""
        if level == "info":
            self._messages = [message for message in self._messages if message[0] == "warning"]
        self._messages.append((level, text))
        self._draw()

    def on_progress(self, progress: Progress) -> None:
        """Move the bar."""
        before, self._progress = self._progress, progress
        is_new = before is None or before.phase != progress.phase
        if is_new or time.monotonic() - self._shown >= _REFRESH_S:
            self._draw()

    def on_round(self, summary: RoundSummary) -> None:
        """Add a row."""
        self._rounds.append(summary)
        self._draw()

    def _draw(self) -> None:
        self._shown = time.monotonic()
        self._show(self._box())

    def _box(self) -> str:
        parts = [
            f"<div>{'⚠ ' if level == 'warning' else ''}{_escaped(text)}</div>"
            for level, text in self._messages
        ]
        if self._progress is not None:
            done, total = self._progress.done, max(self._progress.total, 1)
            bar = f'<progress value="{done}" max="{total}"></progress>'
            parts.append(f"<div>{bar} {_escaped(_phase(self._progress))}</div>")
        if self._rounds:
            heads = "".join(f"<th>{label}</th>" for label, _ in _COLUMNS)
            rows = "".join(
                f"<tr><td>{summary.round}</td>"
                + "".join(f"<td>{value}</td>" for _, value in _figures(summary.metrics))
                + "</tr>"
                for summary in self._rounds
            )
            parts.append(f"<table><tr><th>round</th>{heads}</tr>{rows}</table>")
        return "<div>" + "".join(parts) + "</div>"


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _phase(progress: Progress) -> str:
    line = f"round {progress.round}: {progress.phase}"
    return f"{line} {progress.done:,}/{progress.total:,}" if progress.total > 1 else line


def _figures(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Label and number of each column; an empty text where the round lacks it."""
    found = []
    for label, keys in _COLUMNS:
        value = next((metrics[key] for key in keys if key in metrics), math.nan)
        number = f"{value:,.0f}" if label == "samples" else f"{value:.3f}"
        found.append((label, "" if math.isnan(value) else number))
    return found


def _notebook_display() -> Callable[[str], object] | None:
    """Shows HTML in the cell that runs, replacing what it showed before; None outside of a notebook."""
    module: Any = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import HTML, display

    handle = display(HTML("<div>loading</div>"), display_id=True)
    return lambda text: handle.update(HTML(text))
