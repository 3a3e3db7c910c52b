"""Nothing that lies in a stranger's folder leads a reader out of it, hangs it or fills its memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quark.errors import UnsafeFileError
from quark.run_directory import RunDirectory
from quark.safe_files import check_tree, contained, lines, read_bytes
from tests.planted import PLANTS, Plant


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "plain").write_bytes(b"plain\n")
    (folder / "sub" / "deep").write_bytes(b"deep\n")
    return folder


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_file_is_neither_read_nor_waited_for(folder: Path, plant: Plant) -> None:
    plant(folder / "sub" / "deep")
    for read in (read_bytes, lambda path, root: list(lines(path, root)), check_tree):
        with pytest.raises(UnsafeFileError, match="deep"):
            read(folder / "sub" / "deep", folder)
    with pytest.raises(UnsafeFileError, match="deep"):
        check_tree(folder, folder)


def test_a_linked_folder_leads_nowhere(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    (folder / "sub").rename(elsewhere)
    (folder / "sub").symlink_to(elsewhere)
    with pytest.raises(UnsafeFileError, match="link out of"):
        read_bytes(folder / "sub" / "deep", folder)
    with pytest.raises(UnsafeFileError, match="link out of"):
        check_tree(folder, folder)


def test_links_that_stay_within_are_followed(folder: Path) -> None:
    (folder / "inside").symlink_to("sub/deep")
    (folder / "loop").symlink_to(".")
    check_tree(folder, folder)
    assert read_bytes(folder / "inside", folder) == b"deep\n"
    by_link = folder.parent / "by-link"
    by_link.symlink_to(folder)
    assert read_bytes(by_link / "inside", by_link) == b"deep\n"


def test_the_layout_of_the_hubs_cache_is_no_way_out(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "rev"
    blobs = tmp_path / "models--a--b" / "blobs"
    for path in (snapshot, blobs):
        path.mkdir(parents=True)
    (blobs / "hash").write_bytes(b"{}")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    check_tree(snapshot, snapshot)
    assert read_bytes(snapshot / "config.json", snapshot) == b"{}"
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (blobs / "other").symlink_to(secret)
    (snapshot / "other.json").symlink_to("../../blobs/other")
    with pytest.raises(UnsafeFileError):
        contained(snapshot / "other.json", snapshot)


def test_what_is_read_is_bounded(folder: Path) -> None:
    with pytest.raises(UnsafeFileError, match="more than 3 bytes"):
        read_bytes(folder / "plain", folder, limit=3)
    (folder / "plain").write_bytes(b"one\n" + b"x" * 100 + b"\nlast")
    assert list(lines(folder / "plain", folder, limit=10)) == [b"one\n", b"x" * 10, b"last"]


_PLACES = (
    "run.json.partial",
    "config.toml",
    "config.toml.partial",
    "metrics.jsonl",
    "checkpoints",
    "checkpoints/step-00000001",
    "checkpoints/step-00000001/state.json",
    "reference_cache/ab/x.safetensors",
    "served/initial",
    "served/initial.partial",
    "model",
    "model/config.json",
    "model.partial",
    "model.previous",
    "report.html",
    "tensorboard",
    "a-file-of-a-later-version",
)


@pytest.mark.parametrize("place", [*_PLACES, "pool", "wandb"])
def test_a_link_out_of_a_run_is_found_wherever_it_lies(tmp_path: Path, place: str) -> None:
    run = RunDirectory(tmp_path / "run")
    path = run.path / place
    path.parent.mkdir(parents=True)
    run.check()
    path.symlink_to(tmp_path)
    with pytest.raises(UnsafeFileError, match=path.name):
        run.check()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("place", _PLACES)
def test_a_named_pipe_in_a_run_is_found(tmp_path: Path, place: str) -> None:
    run = RunDirectory(tmp_path / "run")
    path = run.path / place
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(UnsafeFileError, match="not a plain file"):
        run.check()
