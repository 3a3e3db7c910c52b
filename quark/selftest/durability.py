"""The whole examination of one folder's disk: ``quark selftest --durability``.

It cannot show that the disk keeps synced data after a power cut. Only pulling the plug does. The pool's own behavior at a power cut is tested on a simulated disk, at every write.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from quark.errors import PoolError
from quark.selftest.base import Check
from quark.selftest.damage import check_damage
from quark.selftest.disk import (
    FileSystem,
    Latency,
    check_disk,
    file_system_of,
    measure_appends,
    measure_syncs,
    warnings_of,
)
from quark.selftest.writers import check_kills, check_second_writer

NUM_KILLS = 25
NUM_FLIPPED_BYTES = 1000
_LEAST_WAIT_S = 0.02
"""Kills are spread over at least this long after an acknowledgement."""

OnProgress: TypeAlias = Callable[[str, int, int], None]
"""Called with (name of the check, trials done, trials in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DurabilityReport:
    """What the examination found."""

    folder: Path
    file_system: FileSystem
    checks: tuple[Check, ...]
    sync: Latency | None
    """Writing and syncing one page; None where that failed."""
    append: Latency | None
    """One durable append of some 30 short samples."""
    warnings: tuple[str, ...]
    """Reasons not to keep pools here although every check passed."""
    seconds: float

    @property
    def is_passed(self) -> bool:
        """Whether every check passed; warnings do not count."""
        return all(check.is_passed for check in self.checks)


def examine(
    folder: Path,
    *,
    num_kills: int = NUM_KILLS,
    num_flipped_bytes: int | None = NUM_FLIPPED_BYTES,
    seed: int | None = None,
    on_progress: OnProgress,
) -> DurabilityReport:
    """Examine the disk that a folder is on, in a new folder inside it that is removed afterwards.

    It starts processes, so a script calls it under ``if __name__ == "__main__":``.

    Args:
        folder: must exist.
        num_kills: writers to kill.
        num_flipped_bytes: bytes of a pool to damage, one at a time; None damages every one.
        seed: of the moments and places; None takes other ones each time.
        on_progress: told after every trial.

    Raises:
        OSError: nothing can be written in ``folder``.
    """
    begin = time.monotonic()
    chance = random.Random(seed)
    checks: list[Check] = []
    sync = append = None

    def run(name: str, check: Callable[[], Check]) -> None:
        on_progress(name, 0, 0)
        try:
            checks.append(check())
        except (PoolError, OSError) as error:
            failure = f"{type(error).__name__}: {error}"
            checks.append(Check(name=name, num_trials=0, detail="", problems=(failure,)))

    scratch = Path(tempfile.mkdtemp(prefix="quark-selftest-", dir=folder))
    try:
        run("disk", lambda: check_disk(scratch))
        if checks[-1].is_passed:
            sync = measure_syncs(scratch)
            append = measure_appends(scratch)
        run("second_writer", lambda: check_second_writer(scratch))
        longest_wait_s = max(_LEAST_WAIT_S, 2 * append.max if append else 0.0)
        run(
            "kill",
            lambda: check_kills(
                scratch,
                num_trials=num_kills,
                longest_wait_s=longest_wait_s,
                chance=chance,
                on_trial=lambda done, total: on_progress("kill", done, total),
            ),
        )
        run(
            "damage",
            lambda: check_damage(
                scratch,
                num_bytes=num_flipped_bytes,
                chance=chance,
                on_trial=lambda done, total: on_progress("damage", done, total),
            ),
        )
    finally:
        shutil.rmtree(scratch)
    file_system = file_system_of(folder)
    return DurabilityReport(
        folder=folder,
        file_system=file_system,
        checks=tuple(checks),
        sync=sync,
        append=append,
        warnings=tuple(warnings_of(file_system, sync)),
        seconds=time.monotonic() - begin,
    )
