"""Shows a training run while it happens.

``RunDisplay`` is the console's ``TrainingListener``. On a terminal it keeps one live line at the bottom;
elsewhere it writes plain lines and, when nothing was written for a while, a heartbeat that names the
phase, so that a log is never silent. Both write each round's line and a few of its samples.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from quark.cli.console import (
    bar,
    completed,
    continued,
    count,
    counted,
    duration,
    figures,
    foreign,
    grid,
    heading,
    number,
    prose,
)
from quark.evaluation.metrics import DIRECTIONS, is_better
from quark.training.events import Phase, Progress, RoundSummary, SampleView, TrainingResult

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

HEARTBEAT_S = 10.0
SAMPLES_PER_QUANTILE = 3
_UNITS: dict[Phase, str] = {
    "loading": "",
    "exploring": "samples",
    "scoring": "samples",
    "learning": "steps",
    "evaluating": "prompts",
    "saving": "",
}
_FIGURES = (
    ("reward", "reward_mean", 3),
    ("KL", "kl_policy_to_reference", 3),
    ("loss", "loss", 2),
)


class RunDisplay:
    """Shows a run; use it as a context manager around everything that reports to it.

    Args:
        console: where to write (stderr's).
        quiet: show warnings only.
        heartbeat_s: longest silence when not on a terminal, in seconds.
        clock: seconds from anywhere, for tests.
    """

    def __init__(
        self,
        console: Console,
        *,
        quiet: bool = False,
        heartbeat_s: float = HEARTBEAT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._quiet = quiet
        self._is_live = console.is_terminal and not quiet
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._ended = threading.Event()
        self._pulse: threading.Thread | None = None
        self._progress: Progress | None = None
        self._phase_started = clock()
        self._phase_done = 0
        self._phase_left = math.nan
        self._phase_seen = clock()
        self._last_line = clock()
        self._started = clock()
        self._rounds_seen = 0
        self._first_round_ended: float | None = None
        self._is_first_round_whole = True
        self._seconds_per_round = math.nan
        self._rounds_left = 0
        self._round_started = clock()
        self._last: dict[str, float] = {}

    def __enter__(self) -> RunDisplay:
        if self._is_live:
            from rich.live import Live

            self._live = Live(
                console=self._console,
                get_renderable=self._live_line,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        elif not self._quiet:
            self._pulse = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._pulse.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._live is not None:
            self._live.stop()
        if self._pulse is not None:
            self._pulse.join()

    def on_message(self, text: str, *, level: Literal["info", "warning"] = "info") -> None:
        """Print a message; if the display is quiet, only a warning."""
        if level == "warning":
            self._print(prose("warning: " + text, "yellow"))
        elif not self._quiet:
            self._print(prose(text))

    def on_progress(self, progress: Progress) -> None:
        """Take in the progress of a phase. Without a live display, also write the phase's line when it is due."""
        with self._lock:
            before = self._progress
            if before is None or (before.phase, before.round) != (progress.phase, progress.round):
                self._phase_started = self._clock()
                self._phase_done = progress.done
                if progress.phase == "learning" and progress.done > 1 and self._rounds_seen == 0:
                    self._is_first_round_whole = False
                if before is None or before.phase == "loading":
                    self._started = self._clock()  # loading is no part of a round
            self._phase_seen = self._clock()
            self._phase_left = self._left_of_phase(progress)
            self._progress = progress
            self._last.update(progress.metrics)
        if not self._is_live and not self._quiet:
            self.heartbeat()

    def on_round(self, summary: RoundSummary) -> None:
        """Update the time estimates and, unless the display is quiet, print the round's figures and samples."""
        with self._lock:
            now = self._clock()
            self._rounds_seen += 1
            if self._first_round_ended is None:
                self._first_round_ended = now
                if self._is_first_round_whole:
                    self._seconds_per_round = now - self._started
            else:
                self._seconds_per_round = (now - self._first_round_ended) / (self._rounds_seen - 1)
            self._rounds_left = max(summary.num_rounds - summary.round - 1, 0)
            self._round_started = now
            self._last.update(summary.metrics)
        if self._quiet:
            return
        self._print(prose(round_line(summary), "bold"))
        if summary.best_samples or summary.worst_samples:
            self._print(samples_table(summary.best_samples, summary.worst_samples))
            self._print("")

    def heartbeat(self) -> bool:
        """Write the phase's line if nothing was written for a while; returns whether it did."""
        with self._lock:
            if self._progress is None or self._clock() - self._last_line < self._heartbeat_s:
                return False
            line = "  " + " · ".join(self._parts(self._progress))
            self._print(prose(line))
            return True

    def _beat(self) -> None:
        while not self._ended.wait(1.0):
            self.heartbeat()

    def _print(self, renderable: RenderableType) -> None:
        with self._lock:
            self._console.print(renderable, soft_wrap=False)
            self._last_line = self._clock()

    def _parts(self, progress: Progress) -> list[str]:
        # While it loads, a run that goes on does not know its round yet.
        where = "" if progress.phase == "loading" else f"round {progress.round} "
        parts = [f"{where}{progress.phase}"]
        if progress.total > 1:
            unit = _UNITS[progress.phase]
            parts.append(f"{count(progress.done)}/{count(progress.total)} {unit}".rstrip())
        left, of_what = self._seconds_left()
        if math.isfinite(left):
            parts.append(f"{duration(left)} left{of_what}")
        return parts + self._latest()

    def _latest(self) -> list[str]:
        shown = [
            f"{label} {number(self._last[key], digits)}"
            for label, key, digits in _FIGURES
            if math.isfinite(self._last.get(key, math.nan))
        ]
        speed = self._last.get("tokens_per_s", math.nan)
        if math.isfinite(speed):
            shown.append(f"{_thousands(speed)} tok/s")
        return shown

    def _seconds_left(self) -> tuple[float, str]:
        """Seconds, and of what they are: of the rounds, or of the phase as long as no round was seen whole.

        They count down between events: a guess that is made anew while nothing happens would grow.
        """
        now = self._clock()
        if math.isfinite(self._seconds_per_round) and self._rounds_left > 0:
            in_round = self._seconds_per_round - (now - self._round_started)
            return max(in_round, 0.0) + (self._rounds_left - 1) * self._seconds_per_round, ""
        left = self._phase_left
        if math.isfinite(left):
            left = max(left - (now - self._phase_seen), 0.0)
        return left, " in this phase"

    def _left_of_phase(self, progress: Progress) -> float:
        done = progress.done - self._phase_done
        if done <= 0 or progress.total <= progress.done:
            return math.nan
        return (self._clock() - self._phase_started) / done * (progress.total - progress.done)

    def _live_line(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            progress = self._progress
            if progress is None:
                return Spinner("dots", text=Text(" starting", style="dim"))
            parts = self._parts(progress)
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(width=min(20, self._console.width // 6))
        line.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        if progress.total > 1:
            middle: RenderableType = ProgressBar(total=progress.total, completed=progress.done)
        else:
            middle = Spinner("dots")
        line.add_row(Text(parts[0], style="bold cyan"), middle, Text(" · ".join(parts[1:])))
        return line


def drift(metrics: Mapping[str, float], result: TrainingResult) -> float:
    """KL of the sampled distribution to the original model, in nats per token; of the policy in runs without it."""
    return metrics.get("kl_sampled_to_reference_after", result.kl_policy_to_reference)


def round_line(summary: RoundSummary) -> str:
    """One round in one line."""
    metrics = summary.metrics
    parts = [f"round {summary.round}/{summary.num_rounds - 1}"]
    for label, keys, digits in (
        ("reward", ("reward_mean",), 3),
        ("held-out", ("evaluation_reward_mean",), 3),
        (
            "KL",
            (
                "evaluation_kl_sampled_to_reference",
                "kl_policy_to_reference",
                "kl_policy_to_reference_mean",
            ),
            3,
        ),
        ("distinct-2", ("distinct_2",), 2),
    ):
        value = next((metrics[key] for key in keys if key in metrics), None)
        if value is not None:
            parts.append(f"{label} {number(value, digits)}")
    if "samples" in metrics:
        parts.append(f"pool {count(int(metrics['samples']))} samples")
    failed = metrics.get("failed_scores", 0.0)
    if failed:
        parts.append(f"{count(int(failed))} not scored")
    skipped = metrics.get("skipped_steps", 0.0)
    if skipped:
        parts.append(f"{count(int(skipped))} steps skipped")
    return " · ".join(parts)


def samples_table(best: Sequence[SampleView], worst: Sequence[SampleView]) -> Table:
    """A few samples of the best and the lowest quantile, cut to the width."""
    table = grid("quantile", "reward", "prompt", "completion", right=(1,), wide=(2, 3))
    table.columns[3].ratio = 2
    for label, samples, style in (("best", best, "green"), ("worst", worst, "red")):
        for sample in list(samples)[:SAMPLES_PER_QUANTILE]:
            table.add_row(
                prose(f"{label} ({sample.quantile})", style),
                prose(number(sample.reward)),
                foreign(sample.prompt, limit=200, style="dim"),
                completed(sample.completion, limit=400),
            )
    return table


def control_curve_chart(curve: Sequence[float], *, width: int = 30) -> Table:
    """Mean reward by reward token as a small bar chart; quantile 0 is the lowest."""
    from rich.table import Table

    finite = [value for value in curve if math.isfinite(value)]
    low, high = min([*finite, 0.0]), max([*finite, 0.0])
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True)
    for index, value in enumerate(curve):
        is_best = index == len(curve) - 1
        note = " (best)" if is_best else " (worst)" if index == 0 else ""
        style = "green" if is_best else "red" if index == 0 else "cyan"
        table.add_row(
            prose(f"quantile {index}{note}"),
            prose(number(value)),
            prose(bar(value, low, high, width), style),
        )
    return table


def print_result(console: Console, result: TrainingResult) -> None:
    """The summary at the end of a run."""
    metrics = result.metrics
    console.print()
    console.print(heading("Result"))
    reward = change("reward_mean", result.reward_before, result.reward_after, digits=3)
    reward.append("   (held-out prompts, best quantile)")
    rows: list[tuple[str, RenderableType]] = [("reward", reward)]
    rows += [
        (
            label,
            change(name, metrics[f"{name}_before"], metrics.get(f"{name}_after"), digits=digits),
        )
        for label, name, digits in _compared(metrics)
    ]
    rows += [
        (
            "KL to the original",
            f"{number(drift(metrics, result))} nats per token"
            f"   ({number(metrics.get('kl_sampled_per_completion_after', math.nan), 1)} per completion)",
        ),
        (
            "run",
            f"{counted(result.rounds, 'round')}, {counted(result.samples, 'sample')}, {duration(result.seconds)}",
        ),
    ]
    console.print(figures(rows))
    if result.control_curve:
        console.print()
        console.print(heading("Reward when asked for each quantile"))
        console.print(control_curve_chart(result.control_curve, width=console.width // 3))
    if result.before_after:
        console.print()
        console.print(heading("The same prompt, before and after"))
        for index, pair in enumerate(result.before_after):
            if index:
                console.print()
            console.print(
                figures(
                    [
                        (
                            f"  before {number(pair.before_reward):>6}",
                            continued(pair.prompt, pair.before),
                        ),
                        (
                            f"  after  {number(pair.after_reward):>6}",
                            continued(pair.prompt, pair.after),
                        ),
                    ]
                )
            )
    console.print()
    paths = [("run", result.run_dir), ("pool", result.pool), ("model", result.model)]
    if result.report is not None:
        paths.append(("report", result.report))
    console.print(heading("Files"))
    console.print(figures([(name, foreign(str(path))) for name, path in paths]))


def change(name: str, before: float, after: float | None, *, digits: int) -> Text:
    """A metric before and after training; green if it became better, red if it became worse.

    Args:
        name: of a metric of evaluations, or of a judge, whose scores are better if they are higher.
        before: NaN if it was not measured.
        after: None or NaN if it was not measured.
        digits: after the decimal point.
    """
    text = f"{number(before, digits)} → {number(after, digits)}"
    metric = name if name in DIRECTIONS else "reward_mean"
    is_good = is_better(metric, before, math.nan if after is None else after)
    return prose("").append(text, {True: "green", False: "red", None: ""}[is_good])


def _compared(metrics: Mapping[str, float]) -> Iterator[tuple[str, str, int]]:
    """Label, name and digits of the metrics shown before and after: the judges, then a few of quark's own."""
    names = [key.removesuffix("_before") for key in metrics if key.endswith("_before")]
    for name in names:
        if name not in DIRECTIONS:
            yield f"judge {name}", name, 3
    for name, label, digits in (
        ("distinct_2", "distinct-2", 2),
        ("perplexity_reference", "perplexity", 1),
        ("completion_length_mean", "length in tokens", 1),
    ):
        if name in names:
            yield label, name, digits


def print_next_steps(console: Console, result: TrainingResult) -> None:
    """Suggested commands after a run."""
    import shlex

    run = shlex.quote(str(result.run_dir))
    pool = shlex.quote(str(result.pool))
    prompt = shlex.quote(result.before_after[0].prompt if result.before_after else "The movie")
    console.print()
    console.print(heading("Next"))
    for command in (
        f"quark generate {run} --prompt {prompt}",
        f"quark generate {run} --prompt {prompt} --quantile 0",
        f"quark pool head {pool} --best",
        f"quark report {run}",
    ):
        console.print(foreign("  " + command), soft_wrap=True)


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
