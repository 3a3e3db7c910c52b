"""What a run with an ensemble ranks by: its members on the scales of the first exploration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quark.errors import RunDirectoryError
from quark.pool.base import SamplePool
from quark.pool.combiners import CombinerConfig, Ensemble
from quark.pool.standards import Standards
from quark.refusals import way_on
from quark.training.loop.journal import Journal
from quark.training.processes.process_group import ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenStandards:
    """Makes the combination, and measures the scales where they are not kept yet."""

    columns: Sequence[str]
    """Of the members; empty where the reward is no ensemble."""
    combiner: CombinerConfig
    path: Path
    """The file that keeps the scales."""
    processes: ProcessGroup
    journal: Journal

    def ensemble_of(self, pool: SamplePool) -> Ensemble | None:
        """What ranks the samples of ``pool``; None where the column ``reward`` does.

        Raises:
            RunDirectoryError: the file of the scales is damaged or cannot be written, or is of other members.
        """
        if not self.columns:
            return None
        try:
            standards = Standards.read(self.path)
        except FileNotFoundError:
            standards = self._measured(pool)
        if tuple(standards.members) != tuple(self.columns):
            raise RunDirectoryError(
                f"{self.path} has the scales of {', '.join(standards.members)}, and the ensemble's members are "
                f"{', '.join(self.columns)}: choose another --run-dir"
            )
        return standards.ensemble(self.combiner)

    def _measured(self, pool: SamplePool) -> Standards:
        standards = Standards.measured(pool, self.columns)
        for name in self.columns:
            scores = pool.scores(name)
            if scores.size and not (scores != scores[0]).any():
                self.journal.warn(
                    f"{name} gives every sample the same score, so it has no say in the ensemble"
                )
        if self.processes.is_main_process:
            try:
                standards.write(self.path)
            except OSError as err:
                raise RunDirectoryError(f"cannot write {self.path}: {err}; {way_on(err)}") from err
        return standards
