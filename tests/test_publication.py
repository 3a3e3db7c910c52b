"""A power cut at any moment of a publication leaves the old content or the new one, and what is published stays."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from quark import publication
from quark.publication import (
    AppendedFile,
    clear_left_overs,
    left_overs,
    publish_file,
    publishing,
    publishing_directory,
    set_aside,
)
from tests.full_disk import file_size_limit

OLD, NEW = b"old content", b"the new content, which is longer"


@dataclass
class Disk:
    """What a power cut may leave of a folder, by the operations that were asked of it.

    Of a file, any beginning of what was written since its last sync may be there. Of the names in the folder, each
    change since the last sync of the folder may be there or not, in their order.
    """

    files: dict[int, bytes] = field(default_factory=dict)
    """Content by number of the file, as processes see it."""
    synced: dict[int, bytes] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    """The folder after its last sync."""
    changes: list[tuple[str, str, int]] = field(default_factory=list)
    """(name that goes or "", name that comes or "", file) since then."""

    def now(self, num_changes: int | None = None) -> dict[str, int]:
        names = dict(self.names)
        for gone, come, file in self.changes[:num_changes]:
            names.pop(gone, None)
            if come:
                names[come] = file
        return names

    def after_a_cut(self) -> Iterator[dict[str, bytes]]:
        """Every folder that may be found."""
        for num_changes in range(len(self.changes) + 1):
            names = self.now(num_changes)
            kept = [
                [
                    self.files[file][:end]
                    for end in range(len(self.synced[file]), len(self.files[file]) + 1)
                ]
                for file in names.values()
            ]
            for contents in product(*kept):
                yield dict(zip(names, contents, strict=True))


class Recorder:
    """Passes the system's operations on a folder through, and checks after each what a power cut could leave."""

    def __init__(self, folder: Path, check: Callable[[dict[str, bytes]], None]) -> None:
        self.folder = folder
        self.check = check
        self.disk = Disk()
        self.num_operations = 0
        self._open: dict[int, int] = {}
        """File by descriptor; -1 is the folder."""
        for number, path in enumerate(sorted(folder.iterdir())):
            self.disk.names[path.name] = number
            self.disk.files[number] = self.disk.synced[number] = path.read_bytes()

    def _done(self) -> None:
        self.num_operations += 1
        # The model of the disk is the disk: otherwise the checks would say nothing.
        seen = {name: self.disk.files[file] for name, file in self.disk.now().items()}
        assert seen == {path.name: path.read_bytes() for path in self.folder.iterdir()}
        for found in self.disk.after_a_cut():
            self.check(found)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            opened, fsync, replace, rename, unlink = (
                os.open, os.fsync, os.replace, os.rename, os.unlink,
            )  # fmt: skip
            write = publication.StagedFile.write

            def opening(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
                descriptor = opened(path, flags, mode, **more)
                name = Path(path).name
                if Path(path) == self.folder:
                    self._open[descriptor] = -1
                elif Path(path).parent == self.folder:
                    if name not in self.disk.now():
                        file = len(self.disk.files)
                        self.disk.files[file] = self.disk.synced[file] = b""
                        self.disk.changes.append(("", name, file))
                    self._open[descriptor] = self.disk.now()[name]
                    self._done()
                return descriptor

            def writing(staged: publication.StagedFile, data: Any) -> int:
                done = write(staged, data)
                self.disk.files[self._open[staged.fileno()]] += bytes(data)[:done]
                self._done()
                return done

            def syncing(descriptor: int) -> None:
                fsync(descriptor)
                if (file := self._open[descriptor]) == -1:
                    self.disk.names, self.disk.changes = self.disk.now(), []
                else:
                    self.disk.synced[file] = self.disk.files[file]
                self._done()

            def moving(act: Callable[..., None]) -> Callable[..., None]:
                def moved(source: Any, target: Any) -> None:
                    act(source, target)
                    names = self.disk.now()
                    self.disk.changes.append(
                        (Path(source).name, Path(target).name, names[Path(source).name])
                    )
                    self._done()

                return moved

            def removing(path: Any, **more: Any) -> None:
                unlink(path, **more)
                self.disk.changes.append((Path(path).name, "", -1))
                self._done()

            patch.setattr(os, "open", opening)
            patch.setattr(os, "fsync", syncing)
            patch.setattr(os, "replace", moving(replace))
            patch.setattr(os, "rename", moving(rename))
            patch.setattr(os, "unlink", removing)
            patch.setattr(publication.StagedFile, "write", writing)
            yield


def old_or_new(found: dict[str, bytes]) -> None:
    assert found.get("target") in (OLD, NEW), found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "target").write_bytes(OLD)
    return folder


def test_a_power_cut_leaves_the_old_file_or_the_new_one(folder: Path) -> None:
    recorder = Recorder(folder, old_or_new)
    with recorder():
        publish_file(folder / "target", NEW)
    assert recorder.num_operations == len(["open", "write", "sync", "rename", "sync the folder"])
    assert {found["target"] for found in recorder.disk.after_a_cut()} == {NEW}, "it is durable"


def test_a_power_cut_leaves_no_part_of_a_first_file(tmp_path: Path) -> None:
    def nothing_or_new(found: dict[str, bytes]) -> None:
        assert found.get("target") in (None, NEW), found

    recorder = Recorder(tmp_path, nothing_or_new)
    with recorder(), publishing(tmp_path / "target") as file:
        for byte in NEW:
            file.write_all(bytes([byte]))
    assert {found["target"] for found in recorder.disk.after_a_cut()} == {NEW}


def test_a_publication_that_fails_leaves_the_old_file_at_every_cut(folder: Path) -> None:
    def old(found: dict[str, bytes]) -> None:
        assert found["target"] == OLD, found

    def fail() -> None:
        with publishing(folder / "target") as file:
            file.write_all(NEW)
            raise ZeroDivisionError

    with Recorder(folder, old)(), pytest.raises(ZeroDivisionError):
        fail()
    assert [path.name for path in folder.iterdir()] == ["target"]


def in_place(target: Path) -> None:
    with publication.StagedFile(target.with_name("new"), target=target, mode=0o666) as file:
        target.with_name("new").replace(target)
        file.write_all(NEW)


def without_a_sync(target: Path) -> None:
    publish_file(target, NEW, is_durable=False)


@pytest.mark.parametrize("wrong", [in_place, without_a_sync])
def test_the_recorder_finds_what_a_power_cut_would_spoil(
    folder: Path, wrong: Callable[[Path], None]
) -> None:
    with Recorder(folder, old_or_new)(), pytest.raises(AssertionError, match="target"):
        wrong(folder / "target")


def content_of(path: Path) -> bytes | None:
    return (path / "file").read_bytes() if path.is_dir() else None


def test_a_folder_is_whole_under_one_of_its_two_names_at_every_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The renames are the moments that count: what is renamed is synced by the pool's core, which is cut at every write."""
    final, previous = tmp_path / "final", tmp_path / "final.previous"
    seen = []

    def look() -> None:
        seen.append((content_of(final), content_of(previous)))

    rename, publish = os.rename, publication._pool_rs.publish_directory

    def renaming(source: Any, target: Any) -> None:
        look()
        rename(source, target)
        look()

    def publishing_it(source: Any, target: Any) -> None:
        look()
        publish(source, target)
        look()

    monkeypatch.setattr(os, "rename", renaming)
    monkeypatch.setattr(publication._pool_rs, "publish_directory", publishing_it)
    for content in (OLD, NEW):
        with publishing_directory(final, is_replacing=True) as staged:
            (staged / "file").write_bytes(content)
        look()
    assert seen == [
        (None, None), (OLD, None), (OLD, None),
        # What can take long, the first two, leaves the old folder in its place.
        (OLD, None), (OLD, None), (OLD, None), (None, OLD), (None, OLD), (NEW, OLD), (NEW, None),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_folder_that_a_killed_writer_moved_away_comes_back(tmp_path: Path) -> None:
    final = tmp_path / "final"
    (tmp_path / "final.previous").mkdir()
    (tmp_path / "final.previous" / "file").write_bytes(OLD)
    with pytest.raises(ZeroDivisionError), publishing_directory(final, is_replacing=True):
        raise ZeroDivisionError
    assert content_of(final) == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_folder_takes_the_place_of_none_unless_it_may(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    with pytest.raises(FileExistsError, match="final"), publishing_directory(final) as staged:
        (staged / "file").write_bytes(NEW)
    assert [path.name for path in tmp_path.rglob("*")] == ["final"]


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(OLD)
    target = tmp_path / "target"
    target.symlink_to(precious)
    publish_file(target, NEW)
    assert (precious.read_bytes(), target.read_bytes(), target.is_symlink()) == (OLD, NEW, False)
    link = tmp_path / "log"
    link.symlink_to(precious)
    with pytest.raises(OSError, match="log"):
        AppendedFile(link, keep=0)
    assert precious.read_bytes() == OLD


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_the_umasks(tmp_path: Path, mask: int, expected: int) -> None:
    before = os.umask(mask)
    try:
        publish_file(tmp_path / "file", NEW)
        publish_file(tmp_path / "private", NEW, mode=0o600)
        log = AppendedFile(tmp_path / "log", keep=0)
        log.close()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"file": expected, "private": 0o600, "log": expected}


def test_what_killed_writers_left_is_removed_when_nobody_can_be_writing(folder: Path) -> None:
    stale, fresh, folder_of_one = (folder / f"target.partial-{number:08x}" for number in range(3))
    stale.write_bytes(b"half")
    fresh.write_bytes(b"half")
    folder_of_one.mkdir()
    foreign = [
        folder / name for name in ("target.partial-mine", "target.part", "other.partial-00000000")
    ]
    of_a_user = folder / "target.partial"
    for path in (*foreign, of_a_user):
        path.write_bytes(b"mine")
    long_ago = time.time() - 2 * 86_400
    for path in (stale, folder_of_one, of_a_user, *foreign):
        os.utime(path, (long_ago, long_ago))
    publish_file(folder / "target", NEW)
    assert sorted(left_overs(folder / "target")) == [of_a_user, fresh]
    clear_left_overs(folder / "target")
    assert left_overs(folder / "target") == []
    assert all(path.exists() for path in foreign)


def test_what_is_set_aside_is_a_left_over(folder: Path) -> None:
    set_aside(folder / "target")
    (aside,) = left_overs(folder / "target")
    assert aside.read_bytes() == OLD
    assert not (folder / "target").exists()


def test_a_disk_that_refuses_is_told_by_the_targets_name_and_leaves_it_as_it_was(
    folder: Path,
) -> None:
    target = folder / "target"
    with file_size_limit(len(OLD)), pytest.raises(OSError, match=r"target'$") as refused:
        publish_file(target, NEW)
    assert refused.value.errno == errno.EFBIG
    assert refused.value.filename == str(target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"target": OLD}
    with pytest.raises(FileNotFoundError) as missing:
        publish_file(folder / "no" / "target", NEW)
    assert missing.value.filename == str(folder / "no" / "target")
    with pytest.raises(IsADirectoryError) as in_the_way:
        publish_file(folder, NEW)
    assert in_the_way.value.filename == str(folder)
    assert not left_overs(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes")
def test_a_pipe_and_a_device_are_not_replaced(tmp_path: Path) -> None:
    pipe, device = tmp_path / "pipe", tmp_path / "device"
    os.mkfifo(pipe)
    device.symlink_to("/dev/null")
    for target in (pipe, device):
        with pytest.raises(FileExistsError) as refused:
            publish_file(target, NEW)
        assert refused.value.filename == str(target)
    assert pipe.is_fifo()
    assert device.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "pipe"]


def test_a_record_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"first\nrest of a record")
    log = AppendedFile(path, keep=6)
    log.append(b"second\n")
    with file_size_limit(20), pytest.raises(OSError, match=r"log'$"):
        log.append(b"a record that does not fit\n")
    log.append(b"third\n")
    assert log.sync() == len(b"first\nsecond\nthird\n")
    log.close()
    assert path.read_bytes() == b"first\nsecond\nthird\n"
