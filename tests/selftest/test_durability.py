"""The self-test passes on a sound pool, and each of its checks can fail."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
from pathlib import Path

import pytest

from quark.pool.native import NativePool
from quark.selftest import damage, writers
from quark.selftest.damage import check_damage
from quark.selftest.disk import (
    FileSystem,
    Latency,
    check_disk,
    file_system_of,
    measure_syncs,
    parse_mounts,
    warnings_of,
)
from quark.selftest.durability import examine
from quark.selftest.samples import numbered_batch
from quark.selftest.writers import KilledWriter, check_kills, check_second_writer

REAL_DISK = Latency(median=1e-3, p95=2e-3, max=3e-3)


def ignore(*_: object) -> None:
    """A listener that is told and does nothing."""


def test_a_sound_pool_on_a_sound_disk_passes_and_nothing_is_left(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    report = examine(
        tmp_path,
        num_kills=3,
        num_flipped_bytes=50,
        seed=1,
        on_progress=lambda *progress: told.append(progress),
    )
    assert report.is_passed, report.checks
    assert [c.name for c in report.checks] == ["disk", "second_writer", "kill", "damage"]
    assert [c.num_trials for c in report.checks[:3]] == [4, 3, 3]
    assert report.checks[3].num_trials > 100  # the bytes, and every file cut and removed
    assert "50 of " in report.checks[3].detail
    assert report.append is not None
    assert 0 < report.append.median <= report.append.p95 <= report.append.max
    assert ("kill", 3, 3) in told
    assert {name for name, _, _ in told} == {"disk", "second_writer", "kill", "damage"}
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_it_is_stopped(tmp_path: Path) -> None:
    def stop(name: str, done: int, total: int) -> None:
        if (name, done) == ("kill", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine(tmp_path, on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        examine(tmp_path / "none", on_progress=ignore)


class TestKills:
    @pytest.fixture
    def writer(self, tmp_path: Path) -> KilledWriter:
        """Killed once, soundly."""
        writer = KilledWriter(tmp_path / "pool")
        trial = writer.kill_once(after=3, wait_s=0.0)
        assert trial.problems == ()
        assert trial.num_acknowledged >= 3
        assert writer.examine_all() == ()
        return writer

    def test_a_lost_pool_is_noticed(self, writer: KilledWriter) -> None:
        shutil.rmtree(writer.path)
        (problem,) = writer.examine_all()
        assert "gone" in problem

    def test_a_lost_commit_is_noticed(self, writer: KilledWriter) -> None:
        writer.model.append(numbered_batch(98))
        writer.model.append(numbered_batch(99))
        (problem,) = writer.examine_all()
        assert "were acknowledged" in problem

    def test_a_commit_of_other_samples_is_noticed(self, writer: KilledWriter) -> None:
        with NativePool.open(writer.path, writable=True) as pool:
            pool.append(numbered_batch(99))
        assert any("are there" in p or "not what" in p for p in writer.examine_all())

    def test_a_damaged_byte_is_noticed(self, writer: KilledWriter) -> None:
        (segment, *_) = (writer.path / "segments").iterdir()
        flip(segment, 1000)
        assert any(segment.name in problem for problem in writer.examine_all())

    def test_a_writer_that_fails_is_noticed(self, writer: KilledWriter) -> None:
        with NativePool.open(writer.path, writable=True):
            trial = writer.kill_once(after=1, wait_s=0.0)
        assert "PoolLockedError" in trial.problems[0]
        assert trial.num_acknowledged == 0


def test_kills_hit_several_pools(tmp_path: Path) -> None:
    told: list[int] = []
    check = check_kills(
        tmp_path,
        num_trials=7,
        longest_wait_s=0.05,
        chance=random.Random(0),
        on_trial=lambda done, total: told.append(done),
    )
    assert check.problems == ()
    assert told == [1, 2, 3, 4, 5, 6, 7]
    assert check.detail.startswith("7 writers killed; ")
    assert {p.name for p in tmp_path.iterdir()} == {"killed-0", "killed-5"}


def test_a_second_writer_that_gets_in_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_second_writer(tmp_path).is_passed
    monkeypatch.setattr(writers, "_attempt", lambda path: ("locked", "opened"))
    (tmp_path / "other").mkdir()
    reader, writer = check_second_writer(tmp_path / "other").problems
    assert reader == "a reader in this process was refused: locked"
    assert writer == "a second writer in this process was not refused: opened"


class TestDamage:
    def check(self, folder: Path, num_bytes: int = 20) -> tuple[str, ...]:
        return check_damage(
            folder, num_bytes=num_bytes, chance=random.Random(0), on_trial=ignore
        ).problems

    def test_damage_that_verify_misses_is_a_problem(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(damage, "_is_found", lambda path: False)
        problems = self.check(tmp_path)
        assert len(problems) > 50
        assert all(problem.endswith("not found by verify") for problem in problems)

    def test_other_data_is_a_problem(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read = damage._content
        times = 0

        def content(pool: NativePool) -> dict[str, object]:
            nonlocal times
            times += 1
            return read(pool) | ({"labels": []} if times > 1 else {})

        monkeypatch.setattr(damage, "_content", content)
        problems = self.check(tmp_path)
        assert any(p.startswith("HEAD, removed: ") and p.endswith("labels") for p in problems)
        assert not any(p.startswith("segments") for p in problems)  # those were refused

    def test_a_refusal_without_the_file_is_a_problem(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        renamed = damage._cuts

        def cuts(files: dict[str, bytes]) -> list[damage.Damage]:
            return [
                damage.Damage(file=d.file, what=d.what, content=b"x")
                for d in renamed(files)
                if d.file.startswith("manifest")
            ]

        monkeypatch.setattr(damage, "_cuts", cuts)
        monkeypatch.setattr(damage.PoolError, "__str__", lambda error: "something is wrong")
        assert any("without naming" in problem for problem in self.check(tmp_path))

    def test_another_error_is_a_problem(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = damage._content
        times = 0

        def content(pool: NativePool) -> dict[str, object]:
            nonlocal times
            times += 1
            if times > 1:
                raise UnicodeError("bad text")
            return read(pool)

        monkeypatch.setattr(damage, "_content", content)
        assert any("by UnicodeError: bad text" in problem for problem in self.check(tmp_path))

    def test_the_pool_is_whole_again_after_every_damage(self, tmp_path: Path) -> None:
        assert self.check(tmp_path) == ()
        assert NativePool.verify(tmp_path / "damaged").is_sound


class TestDisk:
    def test_locks_that_do_not_exclude_are_a_problem(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert check_disk(tmp_path).is_passed
        monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)
        assert check_disk(tmp_path).problems == (
            "cannot lock a file: two holders got the same lock",
        )

    def test_syncs_that_fail_are_a_problem(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(descriptor: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(os, "fsync", refuse)
        problems = check_disk(tmp_path).problems
        assert [p.split(":")[0] for p in problems] == ["cannot sync a file", "cannot sync a folder"]

    def test_the_file_system_is_the_longest_mount(self) -> None:
        lines = [
            "22 1 0:1 / / rw - ext4 /dev/root rw",
            r"23 22 0:2 / /data/my\040disk rw shared:1 - nfs4 server:/x rw",
            "24 22 0:3 / /data rw - xfs /dev/sdb rw",
            "25 22 0:4 / /data rw - btrfs /dev/sdc rw",
        ]
        for folder, kind in (
            ("/", "ext4"),
            ("/database", "ext4"),
            ("/data/runs", "btrfs"),
            ("/data/my disk/runs", "nfs4"),
        ):
            assert parse_mounts(lines, Path(folder)).kind == kind
        assert parse_mounts([], Path("/")) == FileSystem(kind=None, mount_point=None)

    @pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm")
    def test_memory_is_recognised(self) -> None:
        assert file_system_of(Path("/dev/shm")).kind == "tmpfs"

    @pytest.mark.parametrize(
        ("kind", "says"),
        [
            ("tmpfs", "memory"),
            ("nfs4", "local disk"),
            ("fuse.sshfs", "local disk"),
            ("9p", "local disk"),
            ("overlay", "container"),
        ],
    )
    def test_a_bad_place_is_warned_of(self, kind: str, says: str) -> None:
        (warning,) = warnings_of(FileSystem(kind=kind, mount_point="/"), REAL_DISK)
        assert warning.startswith(kind)
        assert says in warning

    @pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "apfs", None])
    def test_a_local_disk_is_not(self, kind: str | None) -> None:
        assert warnings_of(FileSystem(kind=kind, mount_point="/"), REAL_DISK) == []

    def test_a_sync_too_fast_to_be_true_is_warned_of(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        (warning,) = warnings_of(
            FileSystem(kind="ext4", mount_point="/"),
            Latency(median=3e-6, p95=measure_syncs(tmp_path).p95, max=1.0),
        )
        assert "3 µs" in warning


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
