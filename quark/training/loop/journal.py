"""Metric rows, messages and progress of a run, each with its round and step."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping

from quark.training.events import Phase, Progress, RoundSummary, TrainingListener
from quark.training.loop.alerts import Alert
from quark.training.loop.metrics import MetricLog, SilentLog
from quark.training.position import Position


class Journal:
    """Writes the log and tells the listener, on behalf of every part of the loop.

    Args:
        log: gets the rows.
        listener: gets messages and progress.
        position: where the run is. The journal only reads it.
        num_rounds: of the run.
    """

    def __init__(
        self,
        log: MetricLog | SilentLog,
        listener: TrainingListener,
        position: Position,
        *,
        num_rounds: int,
    ) -> None:
        self._log = log
        self._listener = listener
        self.position = position
        self.num_rounds = num_rounds
        self._started = time.monotonic()
        self._warned: set[str] = set()

    @property
    def round(self) -> int:
        """Number of the round under way, from 0; of the last one while the result is made."""
        return min(self.position.round, self.num_rounds - 1)

    def elapsed(self) -> float:
        """Seconds that the run has taken, earlier processes included."""
        return self.position.seconds + time.monotonic() - self._started

    def write(self, event: str, **fields: object) -> None:
        """Append a row of this round and step.

        Raises:
            OSError: the disk refused.
        """
        self._log.write(event, self.position.step, round=self.round, **fields)

    def write_end(self, fields: Mapping[str, object]) -> None:
        """Append the closing row and make all rows durable."""
        self._log.write("end", self.position.step, **fields)
        self._log.sync()

    def write_stop(self, kind: str, reason: str) -> None:
        """Close the log of a run that does not come to its end; a resume cuts this row off."""
        # A full disk refuses this row, too, and is told by the error that ends the run.
        with contextlib.suppress(Exception):
            self.write("stop", kind=kind, reason=reason)
            self._log.sync()

    def sync(self) -> int:
        """Make the rows durable and return the log's length in bytes."""
        return self._log.sync()

    def close(self) -> None:
        """Close the log and its trackers."""
        self._log.close()

    def say(self, text: str) -> None:
        """Send the listener a plain message; nothing is logged."""
        self._listener.on_message(text)

    def warn(self, text: str) -> None:
        """Send the listener a warning; nothing is logged."""
        self._listener.on_message(text, level="warning")

    def warn_once(self, about: str, text: str) -> None:
        """Send the first warning about something, and none of the later ones."""
        if about not in self._warned:
            self._warned.add(about)
            self.warn(text)

    def alert(self, alert: Alert) -> None:
        """Write an alert down and tell it."""
        self.write("alert", **dataclasses.asdict(alert))
        self.warn(alert.text)

    def progress(
        self,
        phase: Phase,
        *,
        done: int = 0,
        total: int = 1,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Tell how far a phase of this round is."""
        self._listener.on_progress(
            Progress(phase=phase, round=self.round, done=done, total=total, metrics=metrics or {})
        )

    def summarize(self, summary: RoundSummary) -> None:
        """Tell what a round brought."""
        self._listener.on_round(summary)
