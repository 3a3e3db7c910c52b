"""A fork holds what was forked, and neither pool feels what happens to the other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from quark.pool.native import NativePool
from quark.training.loop.draws import first_snapshot_with
from tests.cli.commands import quark, quark_process
from tests.pool.batches import VOCAB_SIZE, assert_same_content, make_batch


@pytest.fixture
def pool(tmp_path: Path) -> NativePool:
    """Nine appends of three samples, merges included."""
    pool = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE, metadata={"run": "a"})
    for number in range(9):
        pool.append(make_batch(f"k{number}", {"reward": [0.5, -1.0, float("nan")]}, content=number))
    return pool


def test_a_fork_is_the_same_pool_with_another_uuid(pool: NativePool, tmp_path: Path) -> None:
    with pool.fork(tmp_path / "fork") as fork:
        assert_same_content(fork, pool)
        assert fork.snapshot == pool.snapshot
        ours, theirs = pool.info(), fork.info()
        assert ours.uuid != theirs.uuid
        assert ours.metadata == theirs.metadata
        assert fork.find("k3") == pool.find("k3")
        assert (pool.oldest_generation, fork.oldest_generation) == (0, 9)
    links = [file.stat().st_nlink for file in (tmp_path / "fork").glob("*/*.arrow")]
    assert links
    assert set(links) == {2}


def test_neither_pool_feels_the_other(pool: NativePool, tmp_path: Path) -> None:
    with pool.fork(tmp_path / "fork") as fork:
        for number in range(9, 20):
            fork.append(make_batch(f"k{number}", {"reward": [float(number)]}, content=number))
            pool.append(make_batch(f"k{number}", {"reward": [float(-number)]}, content=number))
        fork.rescore("reward", lambda _, texts: [float(len(text)) for text in texts])
        assert fork.scores("reward").tolist() != pool.scores("reward").tolist()
        before = pool.scores("reward")
    shutil.rmtree(tmp_path / "fork")
    np.testing.assert_array_equal(pool.scores("reward"), before)
    assert NativePool.verify(tmp_path / "pool").is_sound
    pool.fork(tmp_path / "fork").close()
    pool.close()
    shutil.rmtree(tmp_path / "pool")
    assert NativePool.verify(tmp_path / "fork").is_sound


def test_snapshots_before_the_fork_are_refused_and_later_ones_open(
    pool: NativePool, tmp_path: Path
) -> None:
    with NativePool.open(tmp_path / "pool", snapshot=4) as old, old.fork(tmp_path / "fork") as fork:
        for number in range(3):
            fork.append(make_batch(f"new{number}", {"reward": [1.0, 2.0]}))
    for generation in range(4, 8):
        with NativePool.open(tmp_path / "fork", snapshot=generation) as then:
            assert len(then) == 12 + 2 * (generation - 4)
    for generation in (0, 3, 8):
        with pytest.raises(
            ValueError, match=rf"no snapshot {generation}; it has those from 4 to 7"
        ):
            NativePool.open(tmp_path / "fork", snapshot=generation)
    for num_samples, generation in ((5, 4), (12, 4), (13, 5), (14, 5), (18, 7), (99, 7)):
        with first_snapshot_with(tmp_path / "fork", num_samples) as then:
            assert then.snapshot.generation == generation
    pool.close()


def test_something_in_the_way_stays(pool: NativePool, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        pool.fork(tmp_path / "pool")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        pool.fork(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        pool.fork(tmp_path / "absent" / "fork")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pool"]


def test_a_killed_fork_is_whole_or_absent(pool: NativePool, tmp_path: Path) -> None:
    pool.close()
    program = (
        "import sys; from quark.pool.native import NativePool\n"
        "pool = NativePool.open(sys.argv[1]); print(flush=True)\n"
        "for i in range(10**6): pool.fork(f'{sys.argv[2]}-{i}').close()"
    )
    for trial in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", program, tmp_path / "pool", tmp_path / f"fork{trial}"],
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.05 * (trial + 1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    forks = [path for path in tmp_path.glob("fork*") if ".partial-" not in path.name]
    assert forks
    for fork in forks:
        assert NativePool.verify(fork).is_sound
    assert NativePool.verify(tmp_path / "pool").is_sound


def test_the_command_forks_a_snapshot(pool: NativePool, tmp_path: Path) -> None:
    made = quark_process(
        "pool", "fork", tmp_path / "pool", tmp_path / "fork", "--snapshot", "5", "--json"
    )
    assert made.code == 0, made.err
    assert (made.json["snapshot"], made.json["samples"]) == (5, 15)
    assert quark("pool", "verify", tmp_path / "fork").code == 0
    again = quark("pool", "fork", tmp_path / "pool", tmp_path / "fork")
    assert (again.code, "exists" in again.err) == (2, True)
    unknown = quark("pool", "fork", tmp_path / "pool", tmp_path / "other", "--snapshot", "77")
    assert (unknown.code, "no snapshot 77" in unknown.err) == (2, True)
    assert (
        "12 samples"
        in quark("pool", "fork", tmp_path / "pool", tmp_path / "people", "--snapshot", "4").out
    )
    pool.close()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes among files")
def test_a_named_pipe_in_place_of_a_file_is_refused_and_nothing_waits(
    pool: NativePool, tmp_path: Path
) -> None:
    pool.close()
    root = tmp_path / "pool"
    for number, path in enumerate(sorted(p for p in root.rglob("*") if p.is_file())):
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        target = tmp_path / f"fork{number}"
        outcome = quark("pool", "fork", root, target)
        if path.parent == root:  # a fork has a lock and a head of its own
            assert outcome.code == 0, outcome.err
            assert NativePool.verify(target).is_sound
        else:
            assert outcome.code == 4, outcome.err
            assert f"{path.relative_to(root)} is damaged" in outcome.err
            assert "a pipe" in outcome.err
            assert not list(tmp_path.glob(f"{target.name}*"))
        path.unlink()
        path.write_bytes(content)
    assert NativePool.verify(root).is_sound
