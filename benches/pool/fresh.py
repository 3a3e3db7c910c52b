"""What is measured in a fresh process: opening until the first minibatch, and what it adds to memory.

`bench_pool.py fresh PEER FOLDER SIZE` imports what the peer needs, once, and then forks for every line `warm`
or `evicted` on its standard input: the child measures, prints one JSON object and is gone. So nothing is open
yet, and neither imports nor the eviction from the page cache are in the clock.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from pool.data import ROUND, Workload
from pool.limits import clock
from pool.peer import Batches, Peer, files_of
from pool.peers import NOT_FORK_SAFE, load


def main(arguments: list[str]) -> int:
    """Serve until the input ends."""
    name, folder, size = arguments
    workload = Workload(int(size))
    if name not in NOT_FORK_SAFE:
        load(name)
    for line in sys.stdin:
        if os.fork() == 0:
            cls = load(name)
            if cls.is_durable:
                found = _opened(cls, Path(folder), workload, line.strip())
            else:
                found = _rebuilt(cls, Path(folder), workload, int(size))
            print(json.dumps(found), flush=True)
            os._exit(0)
        os.wait()
    return 0


def _opened(cls: type[Peer[Any]], folder: Path, workload: Workload, state: str) -> dict[str, float]:
    if state == "evicted":
        evict(folder)
    before = anonymous_bytes()
    batches: list[Batches] = []

    def first() -> None:
        batches.append(cls.open(folder, workload).batches(128))
        batches[0](0)

    def following() -> None:
        for step in range(1, 21):
            batches[0](step)

    found = {"first": clock(first), "following": clock(following)}
    if state == "warm":
        found["anonymous"] = float(anonymous_bytes() - before)
    return found


def _rebuilt(cls: type[Peer[Any]], folder: Path, workload: Workload, size: int) -> dict[str, float]:
    """What a peer that nothing survives holds in memory when it is ready to sample."""
    before = anonymous_bytes()
    peer = cls.create(folder, workload, size)
    for number in range(size // ROUND):
        peer.append(peer.encode(workload.rows(number)))
    peer.prepare()
    peer.batches(128)(0)
    return {"anonymous": float(anonymous_bytes() - before)}


def anonymous_bytes() -> int:
    """Private memory of this process that no file backs, without what imports freed and malloc kept."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    # The counters in /proc/self/status are cheaper, but lag by a batch of pages per core.
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return 1024 * int(next(line for line in rollup.splitlines() if "Anonymous:" in line).split()[1])


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache; pages that some process maps would stay."""
    for path in files_of(folder):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)  # a dirty page cannot be dropped
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
