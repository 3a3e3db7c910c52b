"""The tasks, at one pool size: every peer in turn in every repetition, so that a slow moment hits all."""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pool.data import FULL_SIZE, ROUND, Workload
from pool.limits import Limits, clock
from pool.peer import Batches, Peer, files_of
from pool.peers import load

APPEND, REQUANTIZE, ROUND_TASK = "append 25,000", "re-quantize", "round"
LABELS = "all labels"
SMALL, LARGE = "minibatch 128", "minibatch 1,024"
OPEN_WARM, OPEN_EVICTED = "open, warm", "open, evicted"
NEXT_WARM, NEXT_EVICTED = "next 20, warm", "next 20, evicted"
BYTES, MEMORY = "bytes per sample", "anonymous memory"

Times = dict[str, dict[str, list[float]]]
"""Task -> peer (or peer and way) -> one figure per repetition: seconds or bytes."""

FRESH_ONLY = {"numpy-madvise": "numpy"}
"""Peers that only open what another one wrote."""

LIMIT = "limit"
"""What the machine needs at least, in the row of a peer."""


def measure(
    size: int, names: list[str], folder: Path, limits: Limits, *, repetitions: int
) -> Times:
    """All tasks at pool size ``size``; everything is written below ``folder`` and removed."""
    workload = Workload(size)
    capacity = size + repetitions * ROUND
    folder.mkdir()
    peers: dict[str, Peer[Any]] = {
        name: load(name).create(folder / name, workload, capacity)
        for name in names
        if name not in FRESH_ONLY
    }
    times: Times = defaultdict(lambda: defaultdict(list))
    say(f"N = {size:,}: building {', '.join(peers)}")
    for number in range(size // ROUND):
        rows = workload.rows(number)
        for peer in peers.values():
            peer.append(peer.encode(rows))

    say("rounds")
    for number in range(size // ROUND, capacity // ROUND):
        one_round(workload, number, peers, times)
        record(times, APPEND, limits.append())
        record(times, LABELS, limits.labels(number * ROUND))
    for peer in peers.values():
        peer.prepare()
    if size <= FULL_SIZE:
        for task, batch_size in ((SMALL, 128), (LARGE, 1024)):
            say(task)
            minibatches(peers, task, batch_size, limits, repetitions, times)

    durable = [name for name, peer in peers.items() if peer.is_durable]
    for name in durable:
        used = sum(path.stat().st_size for path in files_of(folder / name))
        times[BYTES][name] = [used / capacity]
        peers[name].close()
    # What this process still maps could not be evicted.
    peers.clear()
    gc.collect()
    say("fresh processes")
    chosen = [name for name in names if FRESH_ONLY.get(name, name) in durable]
    fresh(chosen, folder, size, repetitions, times)
    rebuilt = [name for name in names if name not in chosen and name not in FRESH_ONLY]
    for name in rebuilt:
        with server(name, folder / name, size) as process:
            times[MEMORY][name] = [ask(process, "warm")["anonymous"]]
    shutil.rmtree(folder)
    return {task: dict(row) for task, row in times.items()}


def record(times: Times, task: str, seconds: float | None) -> None:
    """A floor of the machine, where it can be measured."""
    if seconds is not None:
        times[task][LIMIT].append(seconds)


def one_round(workload: Workload, number: int, peers: dict[str, Peer[Any]], times: Times) -> None:
    """Append, re-quantize, label, peer by peer."""
    rows = workload.rows(number)
    for name, peer in peers.items():
        encoded = peer.encode(rows)
        append = clock(lambda peer=peer, encoded=encoded: peer.append(encoded))
        times[APPEND][name].append(append)
        for way, work in peer.quantizers().items():
            times[REQUANTIZE][f"{name} {way}".strip()].append(clock(work))
        times[ROUND_TASK][name].append(append + times[REQUANTIZE][name][-1])
        for way, work in peer.labellers().items():
            times[LABELS][f"{name} {way}".strip()].append(clock(work))


def minibatches(
    peers: dict[str, Peer[Any]],
    task: str,
    batch_size: int,
    limits: Limits,
    repetitions: int,
    times: Times,
) -> None:
    """Seconds per minibatch, once the pages are touched."""
    streams: dict[str, tuple[Batches, int]] = {}
    for name, peer in peers.items():
        batch = peer.batches(batch_size)
        begin, steps = time.perf_counter(), 0
        while steps < 3 or (time.perf_counter() - begin < 1 and steps < 4000):
            batch(steps)
            steps += 1
        seconds = (time.perf_counter() - begin) / steps
        streams[name] = batch, min(2000, max(3, int(0.15 / seconds)))

    for repetition in range(repetitions):
        for name, (batch, count) in streams.items():
            first = 10_000 + repetition * count
            times[task][name].append(typical(batch, first, count))
        record(times, task, limits.batch(batch_size))


def typical(batch: Batches, first: int, count: int) -> float:
    """The median of some batches: one that was interrupted by another program does not count."""
    seconds = [clock(lambda step=step: batch(step)) for step in range(first, first + count)]
    return statistics.median(seconds)


def fresh(names: list[str], folder: Path, size: int, repetitions: int, times: Times) -> None:
    """Opening and memory, in fresh processes: first from the page cache, then from the disk."""
    for name in names:
        for path in files_of(folder / name):
            path.read_bytes()
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(server(name, folder / FRESH_ONLY.get(name, name), size))
            for name in names
        }
        for state, first, following in (
            ("warm", OPEN_WARM, NEXT_WARM),
            ("evicted", OPEN_EVICTED, NEXT_EVICTED),
        ):
            for _ in range(repetitions):
                for name, process in servers.items():
                    found = ask(process, state)
                    if "first" in found:
                        times[first][name].append(found["first"])
                        times[following][name].append(found["following"])
                    if "anonymous" in found:
                        times[MEMORY][name].append(found["anonymous"])


def server(name: str, folder: Path, size: int) -> subprocess.Popen[str]:
    """A process of ``pool.fresh``."""
    program = Path(__file__).parents[1] / "bench_pool.py"
    command = [sys.executable, program, "fresh", name, folder, str(size)]
    quietly = {**os.environ, "PYTHONWARNINGS": "ignore"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=quietly)


def ask(process: subprocess.Popen[str], state: str) -> dict[str, float]:
    """What a child of the server measured."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(state, file=process.stdin, flush=True)
    for line in process.stdout:
        if line.startswith("{"):  # the rest is what a library had to say
            found: dict[str, float] = json.loads(line)
            return found
    raise RuntimeError(f"measuring failed in a fresh process: {process.args!r}")


def say(what: str) -> None:
    """Progress, beside the report."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
