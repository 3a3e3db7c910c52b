"""The disk: whether it has what the pool assumes of it, and how long a durable append takes on it."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quark.pool.native import NativePool
from quark.selftest.base import Check
from quark.selftest.samples import VOCAB_SIZE, numbered_batch

_MOUNTS = Path("/proc/self/mountinfo")
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs"}
    | {"9p", "virtiofs", "vboxsf", "prl_fs", "drvfs"}
)
"""File systems of another machine, or of the host of a virtual one."""
_NUM_SYNCS = 30
_INSTANT_SYNC_S = 20e-6
"""No persistent disk syncs faster than this: a sync is a command to the device and its answer."""
_PAGE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """How long something took, in seconds."""

    median: float
    p95: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """Where a folder lies."""

    kind: str | None
    """As the kernel calls it, e.g. ``ext4``; None where it does not say."""
    mount_point: str | None


def file_system_of(folder: Path) -> FileSystem:
    """The file system of a folder; known on Linux alone."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return FileSystem(kind=None, mount_point=None)
    return parse_mounts(lines, folder.resolve())


def parse_mounts(lines: list[str], folder: Path) -> FileSystem:
    """The mount that a folder is under, by the lines of ``mountinfo``: the longest, and of equals the last."""
    found = FileSystem(kind=None, mount_point=None)
    for line in lines:
        before, _, after = line.partition(" - ")
        point, kind = _unescaped(before.split(" ")[4]), after.split(" ")[0]
        if folder.is_relative_to(point) and len(point) >= len(found.mount_point or ""):
            found = FileSystem(kind=kind, mount_point=point)
    return found


def warnings_of(file_system: FileSystem, sync: Latency | None) -> list[str]:
    """Warnings about a disk that passed all checks.

    Args:
        file_system: where it would lie.
        sync: how long a sync took; None where it failed.
    """
    kind = file_system.kind
    warnings = []
    if kind in _IN_MEMORY:
        warnings.append(f"{kind} is memory: whatever is in it is gone when the machine stops")
    elif kind in _NETWORK or (kind or "").startswith("fuse"):
        warnings.append(
            f"{kind} may be a network's or another program's: locks and syncs there do not reliably do "
            "what a pool needs, so pools should be written on a local disk"
        )
    elif kind == "overlay":
        warnings.append(
            "overlay is a container's own layer: it goes with the container, so mount a volume for runs"
        )
    elif sync is not None and sync.median < _INSTANT_SYNC_S:
        warnings.append(
            f"a sync takes {sync.median * 1e6:.0f} µs: something answers for the disk without waiting for "
            "it, so a power cut can take what was acknowledged"
        )
    return warnings


def measure_syncs(folder: Path) -> Latency:
    """Write and sync one page of a file, again and again. Raises OSError."""
    with (folder / "synced").open("wb", buffering=0) as file:

        def write_and_sync(_: int) -> None:
            file.write(bytes(_PAGE))
            os.fsync(file.fileno())

        return _measured(write_and_sync)


def measure_appends(folder: Path) -> Latency:
    """Append small batches to a pool: each is durable when it is counted. Raises OSError and PoolError."""
    batches = [numbered_batch(number) for number in range(_NUM_SYNCS)]
    with NativePool.create(folder / "measured", vocab_size=VOCAB_SIZE) as pool:
        return _measured(lambda number: pool.append(batches[number]))


def check_disk(folder: Path) -> Check:
    """Whether the file system has what the pool assumes: syncs of files and folders, locks, maps."""
    probes: tuple[tuple[str, Callable[[Path], str | None]], ...] = (
        ("sync a file", _probe_file_sync),
        ("sync a folder", _probe_folder_sync),
        ("lock a file", _probe_lock),
        ("map a file into memory", _probe_map),
    )
    problems = []
    for name, probe in probes:
        try:
            problem = probe(folder)
        except OSError as error:
            problem = str(error)
        if problem is not None:
            problems.append(f"cannot {name}: {problem}")
    return Check(
        name="disk",
        num_trials=len(probes),
        detail="a sync of a file, a sync of a folder, a lock, a memory map",
        problems=tuple(problems),
    )


def _probe_file_sync(folder: Path) -> str | None:
    with (folder / "probe").open("wb") as file:
        file.write(b"probe")
        file.flush()
        os.fsync(file.fileno())
    return None


def _probe_folder_sync(folder: Path) -> str | None:
    (folder / "probe").rename(folder / "probe-renamed")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return None


def _probe_lock(folder: Path) -> str | None:
    from fcntl import LOCK_EX, LOCK_NB, flock  # not on every system, unlike this module

    with (folder / "lock").open("wb") as first, (folder / "lock").open("wb") as second:
        flock(first, LOCK_EX | LOCK_NB)
        try:
            flock(second, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            pass
        else:
            return "two holders got the same lock"
        first.close()
        flock(second, LOCK_EX | LOCK_NB)  # closing gave it back
    return None


def _probe_map(folder: Path) -> str | None:
    path = folder / "mapped"
    content = os.urandom(3 * _PAGE + 5)
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if mapped[:] != content:
            return "a map shows other bytes than were written"
        path.rename(path.with_name("moved"))
        path.with_name("moved").unlink()
        if mapped[:] != content:
            return "a map changes when its file is removed"
    return None


def _measured(act: Callable[[int], object]) -> Latency:
    seconds = []
    for number in range(_NUM_SYNCS):
        begin = time.perf_counter()
        act(number)
        seconds.append(time.perf_counter() - begin)
    seconds.sort()
    return Latency(
        median=statistics.median(seconds),
        p95=seconds[len(seconds) * 95 // 100],
        max=seconds[-1],
    )


def _unescaped(text: str) -> str:
    """A path as ``mountinfo`` writes it: blanks and backslashes as octal numbers."""
    for octal, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        text = text.replace(octal, character)
    return text
