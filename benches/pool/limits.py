"""What the machine allows, measured beside the peers: memory, random reads, the disk's publish floor."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROUND_BYTES = 2_300_000
"""One round of 25,000 samples as the targets count it."""


def clock(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def in_threads(works: list[Callable[[], object]]) -> float:
    """Seconds until all are done, each in a thread of its own."""
    threads = [threading.Thread(target=work) for work in works]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return clock(run)


class Limits:
    """The floors of the tasks, to be measured in turn with the peers, and the machine's rates."""

    def __init__(self, folder: Path, *, is_quick: bool) -> None:
        self._disk = Disk(folder)
        self._copy = Copy(1 << 28)
        self._lines = Lines(folder, 1 << (27 if is_quick else 30))

    def append(self) -> float | None:
        """Seconds to make one round's bytes durable in a new file, its name, and a record of it."""
        return clock(self._disk.publish)

    def labels(self, num_samples: int) -> float | None:
        """Seconds of a copy that moves what labels do: 4 bytes read and 2 written a sample."""
        return 3 * num_samples / self._copy.rate(1)

    def batch(self, batch_size: int) -> float | None:
        """Seconds to read one random line a sample, prefetched; None without a C compiler."""
        rate = self._lines.rate("prefetched", 1)
        return None if rate is None else batch_size / rate

    def rates(self, repetitions: int = 7) -> dict[str, float]:
        """What the machine does at best: GB/s, million lines/s, milliseconds."""
        found: dict[str, float] = {}
        for threads in (1, 2):
            rate = max(self._copy.rate(threads) for _ in range(repetitions))
            found[f"memory copy, threads: {threads}, GB/s"] = rate / 1e9
        for way in ("take", "plain", "prefetched"):
            for threads in (1, 2):
                rates = [self._lines.rate(way, threads) for _ in range(repetitions)]
                known = [rate for rate in rates if rate is not None]
                if known:
                    name = f"random 64-byte lines, {way}, threads: {threads}, M/s"
                    found[name] = max(known) / 1e6
        for name, work in (
            ("write 2.3 MB and sync, ms", self._disk.write_and_sync),
            ("publish 2.3 MB, ms", self._disk.publish),
        ):
            found[name] = 1e3 * min(clock(work) for _ in range(repetitions))
        return found


class Copy:
    """A memory copy."""

    def __init__(self, size: int) -> None:
        self._source = np.ones(size, np.uint8)
        self._target = np.empty_like(self._source)

    def rate(self, threads: int) -> float:
        """Bytes copied per second."""
        size = len(self._source)
        cuts = [slice(size * i // threads, size * (i + 1) // threads) for i in range(threads)]
        return size / in_threads([lambda cut=cut: self._part(cut) for cut in cuts])

    def _part(self, cut: slice) -> None:
        np.copyto(self._target[cut], self._source[cut])


class Lines:
    """Random 64-byte lines of a mapped file: NumPy's take, a plain loop in C, the same with prefetch."""

    def __init__(self, folder: Path, size: int) -> None:
        path = folder / "lines"
        np.ones(size // 8, np.uint64).tofile(path)
        self._lines = np.memmap(path, np.uint64, "r").reshape(-1, 8)
        path.unlink()
        count = 1 << 20
        self._ids = np.random.default_rng(0).integers(0, len(self._lines), count, dtype=np.uint32)
        self._places = self._ids.astype(np.int64)
        self._out = np.empty((count, 8), np.uint64)
        self._library = compiled(folder)
        if self._library is None:
            print("skipped: plain and prefetched random reads need a C compiler (apt install gcc)")

    def rate(self, way: str, threads: int) -> float | None:
        """Lines per second; None without a C compiler."""
        if way != "take" and self._library is None:
            return None
        size = len(self._ids)
        cuts = [slice(size * i // threads, size * (i + 1) // threads) for i in range(threads)]
        return size / in_threads([lambda cut=cut: self._read(way, cut) for cut in cuts])

    def _read(self, way: str, cut: slice) -> None:
        if way == "take":
            np.take(self._lines, self._places[cut], axis=0, out=self._out[cut], mode="clip")
        else:
            ids: NDArray[np.uint32] = self._ids[cut]
            getattr(self._library, way)(
                ctypes.c_void_p(self._lines.ctypes.data),
                ctypes.c_void_p(ids.ctypes.data),
                ctypes.c_size_t(len(ids)),
            )


def compiled(folder: Path) -> ctypes.CDLL | None:
    """The loops of random_reads.c; None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "random_reads.so"
    source = Path(__file__).with_name("random_reads.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


class Disk:
    """What it takes to make one round's bytes durable."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._payload = os.urandom(ROUND_BYTES)
        self._record = os.urandom(500)

    def write_and_sync(self) -> None:
        """A new file, synced."""
        file = os.open(self._folder / "round", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(file, self._payload)
        os.fsync(file)
        os.close(file)

    def publish(self) -> None:
        """The same with its name, and a record of it at the end of a log."""
        (self._folder / "round").unlink(missing_ok=True)
        self.write_and_sync()
        directory = os.open(self._folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        log = os.open(self._folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, self._record)
        os.fdatasync(log)
        os.close(log)
