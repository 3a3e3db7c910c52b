"""What the machine allows, measured beside the peers: memory, random reads, the disk's publish floor."""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
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


def measure_limits(folder: Path, *, is_quick: bool) -> dict[str, float]:
    """Limit -> GB/s, million lines/s or seconds, as its name says."""
    return {
        **memory_copy(1 << 28),
        **random_lines(folder, 1 << (28 if is_quick else 30)),
        **disk(folder, repetitions=5 if is_quick else 15),
    }


def in_threads(works: list[Callable[[], object]]) -> float:
    """Seconds until all are done, each in a thread of its own."""
    threads = [threading.Thread(target=work) for work in works]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return clock(run)


def memory_copy(size: int) -> dict[str, float]:
    """Bytes copied per second, by one thread and by two."""
    source = np.ones(size, np.uint8)
    target = np.empty_like(source)
    half = size // 2

    def copy(part: slice) -> Callable[[], object]:
        return lambda: np.copyto(target[part], source[part])

    one = min(clock(copy(slice(None))) for _ in range(7))
    two = min(in_threads([copy(slice(half)), copy(slice(half, None))]) for _ in range(7))
    return {"copy_1_thread_gb_per_s": size / one / 1e9, "copy_2_threads_gb_per_s": size / two / 1e9}


def random_lines(folder: Path, size: int) -> dict[str, float]:
    """Random 64-byte lines per second: NumPy's take, a plain loop in C, the same with prefetch."""
    lines = np.ones((size // 64, 8), np.uint64)
    count = 1 << 20
    ids = np.random.default_rng(0).integers(0, len(lines), count, dtype=np.uint32)
    places = ids.astype(np.int64)
    out = np.empty((count, 8), np.uint64)

    def rate(seconds: float) -> float:
        return count / seconds / 1e6

    def take() -> object:
        return np.take(lines, places, axis=0, out=out, mode="clip")

    found = {"random_lines_numpy_take_m_per_s": rate(min(clock(take) for _ in range(7)))}
    library = compiled(folder)
    if library is None:
        print("skipped: plain and prefetched random reads need a C compiler (apt install gcc)")
        return found

    def read(function: str, chosen: NDArray[np.uint32]) -> Callable[[], object]:
        return lambda: getattr(library, function)(
            ctypes.c_void_p(lines.ctypes.data),
            ctypes.c_void_p(chosen.ctypes.data),
            ctypes.c_size_t(len(chosen)),
        )

    for function in ("plain", "prefetched"):
        one = min(clock(read(function, ids)) for _ in range(7))
        halves = [ids[: count // 2], ids[count // 2 :]]
        two = min(in_threads([read(function, half) for half in halves]) for _ in range(7))
        found[f"random_lines_{function}_m_per_s"] = rate(one)
        found[f"random_lines_{function}_2_threads_m_per_s"] = rate(two)
    return found


def compiled(folder: Path) -> ctypes.CDLL | None:
    """The loops of random_reads.c; None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "random_reads.so"
    source = Path(__file__).with_name("random_reads.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


def disk(folder: Path, *, repetitions: int) -> dict[str, float]:
    """Seconds to make one round's bytes durable, bare and published."""
    payload = os.urandom(ROUND_BYTES)
    record = os.urandom(500)
    directory = os.open(folder, os.O_RDONLY)
    manifest = os.open(folder / "manifest", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    path = folder / "limit"

    def write_and_sync() -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(file, payload)
        os.fsync(file)
        os.close(file)

    def publish() -> None:
        write_and_sync()
        os.fsync(directory)
        os.write(manifest, record)
        os.fdatasync(manifest)

    times: dict[str, list[float]] = {"write_sync_2.3MB_s": [], "publish_floor_2.3MB_s": []}
    for _ in range(repetitions):
        for name, work in zip(times, (write_and_sync, publish), strict=True):
            times[name].append(clock(work))
            path.unlink()
    os.close(directory)
    os.close(manifest)
    return {name: statistics.median(values) for name, values in times.items()}
