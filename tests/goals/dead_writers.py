"""Writers and readers that die with a pool in their hands: the next one must not have to clean up."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from quark.errors import PoolError, PoolLockedError
from quark.pool.native import NativePool
from quark.selftest.samples import VOCAB_SIZE, numbered_batch
from tests.goals.processes import start

_DEATHS_PER_POOL = 50


@dataclass(slots=True, kw_only=True)
class Deaths:
    """What followed so many deaths."""

    num_deaths: int = 0
    num_while_appending: int = 0
    num_readers: int = 0
    longest_s: float = 0.0
    """Until the next writer had the pool."""
    problems: list[str] = field(default_factory=list)


def kill_holders(folder: Path, *, num_deaths: int, seed: int = 0) -> Deaths:
    """Kill writers that hold the lock, half of them while they append, and open the pool for writing at once.

    Beside every tenth of them a reader is killed as well, and old snapshots are collected after it.
    """
    chance = random.Random(seed)
    deaths = Deaths()
    path = folder / "pool"
    while deaths.num_deaths < num_deaths:
        if deaths.num_deaths % _DEATHS_PER_POOL == 0:
            path = folder / f"pool-{deaths.num_deaths}"
            NativePool.create(path, vocab_size=VOCAB_SIZE).close()
        _die_once(path, deaths, chance)
    return deaths


def _die_once(path: Path, deaths: Deaths, chance: random.Random) -> None:
    trial = deaths.num_deaths
    deaths.num_deaths += 1
    appends = chance.random() < 0.5
    deaths.num_while_appending += appends
    writer, from_writer = start(hold, path, trial * 1000 if appends else None)
    holders = [writer]
    if trial % 10 == 0:
        reader, from_reader = start(pin, path)
        holders.append(reader)
        deaths.num_readers += 1
        from_reader.recv()
    if (said := from_writer.recv()) != "holding":
        deaths.problems.append(f"writer {trial} did not get the pool: {said}")
    elif not appends:
        try:
            NativePool.open(path, writable=True).close()
            deaths.problems.append(f"beside writer {trial} there was a second one")
        except PoolLockedError:
            pass
    time.sleep(chance.uniform(0, 0.01) if appends else 0)
    for holder in holders:
        holder.kill()
        holder.join()
    begin = time.perf_counter()
    try:
        with NativePool.open(path, writable=True) as pool:
            deaths.longest_s = max(deaths.longest_s, time.perf_counter() - begin)
            if len(holders) > 1:
                pool.gc(keep_snapshots=1)
    except PoolError as error:
        deaths.problems.append(f"after writer {trial}: {error}")
    from_writer.close()


def hold(path: Path, number: int | None, sending: Connection) -> None:
    """Take the lock, say so, and append from batch ``number`` on, or wait."""
    try:
        pool = NativePool.open(path, writable=True)
    except PoolError as error:
        sending.send(str(error))
        return
    sending.send("holding")
    while True:
        if number is None:
            time.sleep(60)
        else:
            pool.append(numbered_batch(number))
            number += 1


def pin(path: Path, sending: Connection) -> None:
    """Read a snapshot, say so, and wait."""
    pool = NativePool.open(path)
    if len(pool):
        pool.samples([0])
    sending.send("pinned")
    time.sleep(60)
    pool.samples([])
