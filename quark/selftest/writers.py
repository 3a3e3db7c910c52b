"""Writers that are killed at any moment, and writers that come second.

What a pool must hold after a kill is known exactly: its writer appends batches that anyone can make
again, and says of each that it was acknowledged. The batch that was under way may be there, whole, or not.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

from quark.errors import PoolError, PoolLockedError
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.selftest.base import Check, OnTrial
from quark.selftest.samples import VOCAB_SIZE, fields, numbered_batch

_KILLS_PER_POOL = 5
"""Then a new pool begins, so that its creation is hit as well."""
_READY = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class KillTrial:
    """One life of a writer."""

    num_acknowledged: int
    """Commits that it was promised."""
    problems: tuple[str, ...]


class KilledWriter:
    """A pool whose writer is killed again and again, beside a model of what it must hold.

    Args:
        path: of the pool; the first writer makes it.
        first: number of the first batch; another number is another history.
    """

    def __init__(self, path: Path, *, first: int = 0) -> None:
        self.path = path
        self.model = MemoryPool(vocab_size=VOCAB_SIZE)
        self._first = first

    def kill_once(self, *, after: int, wait_s: float) -> KillTrial:
        """Let a writer append, kill it ``wait_s`` after ``after`` acknowledgements, and examine the pool."""
        acknowledged, problems = _write_and_be_killed(
            self.path, self._next_batch, after=after, wait_s=wait_s
        )
        known = len(self.model)
        for number in acknowledged:
            self.model.append(numbered_batch(number))
        problems += self._examine(known)
        return KillTrial(num_acknowledged=len(acknowledged), problems=tuple(problems))

    def examine_all(self) -> tuple[str, ...]:
        """What is wrong with the whole pool, after a writer has opened it again."""
        try:
            with NativePool.open(self.path, writable=True):
                pass
        except FileNotFoundError:
            pass  # for `_examine` to judge
        except PoolError as error:
            return (f"a writer cannot open the pool: {error}",)
        return tuple(self._examine(0))

    @property
    def _next_batch(self) -> int:
        return self._first + self.model.snapshot.generation

    def _examine(self, known: int) -> list[str]:
        """What is wrong with the samples from ``known`` on, or with any byte."""
        try:
            with NativePool.open(self.path) as pool:
                problems = self._compare(pool, known)
        except FileNotFoundError:
            promised = self.model.snapshot.generation
            return [f"the pool is gone, and {promised} commits with it"] if promised else []
        except PoolError as error:
            problems = [str(error)]
        damage = NativePool.verify(self.path).problems
        return problems + [f"{p.file} is damaged at {p.offset}: {p.what}" for p in damage]

    def _compare(self, pool: NativePool, known: int) -> list[str]:
        # The append that was under way may be there. Commits are not counted: a merge of small files is one, too.
        under_way = numbered_batch(self._next_batch)
        if pool.find(under_way.key) is not None:
            self.model.append(under_way)
        if len(pool) != len(self.model):
            return [f"{len(self.model)} samples were acknowledged and {len(pool)} are there"]
        ids = range(known, len(pool))
        return [
            f"sample {theirs.id} is not what was appended"
            for ours, theirs in zip(pool.samples(ids), self.model.samples(ids), strict=True)
            if fields(ours) != fields(theirs)
        ]


def check_kills(
    folder: Path,
    *,
    num_trials: int,
    longest_wait_s: float,
    chance: random.Random,
    on_trial: OnTrial,
) -> Check:
    """Kill writers at random moments.

    Args:
        folder: for the pools.
        num_trials: kills.
        longest_wait_s: the kill comes at most this long after an acknowledgement; longer than an append
            takes, so that it can hit any part of one.
        chance: chooses the moments.
        on_trial: told after every kill.
    """
    problems: list[str] = []
    num_acknowledged = num_samples = 0
    for start in range(0, num_trials, _KILLS_PER_POOL):
        writer = KilledWriter(folder / f"killed-{start}", first=start * 1_000_000)
        for trial in range(start, min(start + _KILLS_PER_POOL, num_trials)):
            outcome = writer.kill_once(
                after=chance.choice([0, 0, 1, 2, 5]), wait_s=chance.uniform(0, longest_wait_s)
            )
            num_acknowledged += outcome.num_acknowledged
            problems += [f"kill {trial}: {problem}" for problem in outcome.problems]
            on_trial(trial + 1, num_trials)
        problems += [f"after kill {trial}: {problem}" for problem in writer.examine_all()]
        num_samples += len(writer.model)
    return Check(
        name="kill",
        num_trials=num_trials,
        detail=f"{num_trials} writers killed; {num_acknowledged:,} commits were acknowledged, "
        f"{num_samples:,} samples were compared",
        problems=tuple(problems),
    )


def check_second_writer(folder: Path) -> Check:
    """A second writer is refused while there is a first, in this process or another; readers are not."""
    path = folder / "locked"
    problems: list[str] = []
    with NativePool.create(path, vocab_size=VOCAB_SIZE) as pool:
        pool.append(numbered_batch(0))
        for where, attempt in (("this", _attempt), ("another", _attempt_elsewhere)):
            read, written = attempt(path)
            if read != "opened":
                problems.append(f"a reader in {where} process was refused: {read}")
            if written != "locked":
                problems.append(f"a second writer in {where} process was not refused: {written}")
    if (written := _attempt_elsewhere(path)[1]) != "opened":
        problems.append(f"a writer was refused after the first had closed the pool: {written}")
    return Check(
        name="second_writer",
        num_trials=3,
        detail="one beside the first in its process, one in another process, one after it had closed",
        problems=tuple(problems),
    )


def append_until_killed(path: Path, number: int, acknowledged: Connection) -> None:
    """Make or open the pool, append from batch ``number`` on, send each number after its append."""
    try:
        pool = NativePool.open(path, writable=True)
    except FileNotFoundError:
        pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    while True:
        pool.append(numbered_batch(number))
        acknowledged.send(number)
        number += 1


def _processes() -> ForkServerContext:
    """Processes forked from a server without threads, so that hundreds of them are cheap."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _write_and_be_killed(
    path: Path, number: int, *, after: int, wait_s: float
) -> tuple[list[int], list[str]]:
    """The numbers that a writer was promised before it was killed, and what it died of instead."""
    processes = _processes()
    receiving, sending = processes.Pipe(duplex=False)
    writer = processes.Process(target=_live, args=(path, number, sending), daemon=True)
    writer.start()
    sending.close()
    received: list[int | str] = []
    try:
        while len(received) <= after:  # it is ready, and that many acknowledgements
            received.append(receiving.recv())
        time.sleep(wait_s)
        writer.kill()
        while True:
            received.append(receiving.recv())
    except EOFError:
        pass
    finally:
        writer.kill()
        writer.join()
        receiving.close()
    promised = [item for item in received if isinstance(item, int) and item != _READY]
    problems = [f"the writer failed: {item}" for item in received if isinstance(item, str)]
    if not problems and writer.exitcode != -signal.SIGKILL:
        problems.append(f"the writer left with status {writer.exitcode} before it was killed")
    return promised, problems


def _live(path: Path, number: int, sending: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    sending.send(_READY)
    try:
        append_until_killed(path, number, sending)
    except (PoolError, OSError, ValueError) as error:
        sending.send(f"{type(error).__name__}: {error}")


def _attempt(path: Path) -> tuple[str, str]:
    """What comes of opening the pool for reading and for writing: ``opened``, ``locked`` or an error."""

    def outcome(open_pool: Callable[[], NativePool]) -> str:
        try:
            open_pool().close()
        except PoolLockedError:
            return "locked"
        except (PoolError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return "opened"

    return (
        outcome(lambda: NativePool.open(path)),
        outcome(lambda: NativePool.open(path, writable=True)),
    )


def _attempt_elsewhere(path: Path) -> tuple[str, str]:
    processes = _processes()
    receiving, sending = processes.Pipe(duplex=False)
    other = processes.Process(target=_send_attempt, args=(path, sending), daemon=True)
    other.start()
    sending.close()
    try:
        read, written = receiving.recv()
    except EOFError:
        read = written = "the process died"
    other.join()
    receiving.close()
    return read, written


def _send_attempt(path: Path, sending: Connection) -> None:
    sending.send(_attempt(path))
