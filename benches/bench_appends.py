"""Appends over the life of a pool: `python benches/bench_appends.py [--appends 100000] [--samples 10]`.

One writer appends small batches. Beside it, in the same process, a reader refreshes and draws minibatches. For each
twentieth of the appends the table has the time of an append, the live segment files, the memory maps of data files and
the anonymous memory of the process, the time of a minibatch of 64, and all data files with those of older snapshots.
The last lines are the time to open the pool, and what `gc` leaves.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from quark.pool.native import NativePool
from quark.selftest.samples import VOCAB_SIZE, make_batch

DATA_FOLDERS = ("segments", "prompts", "runs", "scores")
NUM_ROWS = 20
NUM_DRAWS = 50


def count_maps() -> int:
    """Maps of data files in this process; -1 where the system does not list them."""
    try:
        return Path("/proc/self/maps").read_text(encoding="utf-8").count(".arrow")
    except OSError:
        return -1


def anonymous_mb() -> float:
    """Private memory of this process in MB that no file backs; NaN where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("nan")
    found = [line.split()[1] for line in lines if line.startswith("RssAnon")]
    return int(found[0]) / 1000 if found else float("nan")


def draw_ms(reader: NativePool) -> float:
    """Mean time of a minibatch of 64, after the reader has moved to the newest snapshot."""
    reader.refresh()
    sampler = reader.quantize(5).sampler(batch_size=64, seed=1)
    begin = time.perf_counter()
    for step in range(NUM_DRAWS):
        sampler.batch(step, pad_id=0)
    return (time.perf_counter() - begin) / NUM_DRAWS * 1e3


def count_files(path: Path) -> int:
    """Data files on the disk, with those that only older snapshots need."""
    return sum(1 for folder in DATA_FOLDERS for _ in (path / folder).iterdir())


def measure(path: Path, num_appends: int, num_samples: int) -> None:
    """Append, and print a row for each part."""
    print(
        "appends    p50 ms  p99 ms  max ms  segments  maps  anonymous MB  minibatch ms  all files"
    )
    scores = np.random.default_rng(0).normal(size=(num_appends, num_samples)).tolist()
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    reader = NativePool.open(path)
    part = max(num_appends // NUM_ROWS, 1)
    times = []
    for number, rewards in enumerate(scores, start=1):
        batch = make_batch(f"bench/{number}", {"reward": rewards}, content=number % 9)
        begin = time.perf_counter()
        pool.append(batch)
        times.append((time.perf_counter() - begin) * 1e3)
        if number % part == 0:
            p50, p99, most = np.quantile(times, [0.5, 0.99, 1.0])
            draws = draw_ms(reader)
            print(
                f"{number:<9,} {p50:7.2f} {p99:7.2f} {most:7.1f} {pool.info().num_segments:9,} {count_maps():5,} "
                f"{anonymous_mb():13.1f} {draws:13.2f} {count_files(path):10,}",
                flush=True,
            )
            times = []
    reader.close()
    pool.close()
    begin = time.perf_counter()
    pool = NativePool.open(path, writable=True)
    print(f"opened in {(time.perf_counter() - begin) * 1e3:.1f} ms")
    pool.gc(keep_snapshots=1)
    print(f"gc leaves {count_files(path):,} data files")
    pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--appends", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=10, help="samples of an append")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder) / "pool", options.appends, options.samples)


if __name__ == "__main__":
    main()
