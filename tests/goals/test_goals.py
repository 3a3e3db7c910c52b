"""The harnesses of the goals, at the size of seconds, and that they notice what they are for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from quark.pool.native import NativePool
from quark.selftest.samples import VOCAB_SIZE, numbered_batch
from tests.goals import readers
from tests.goals.crashed_pool import open_after_crash
from tests.goals.dead_writers import kill_holders
from tests.goals.readers import PERIOD, History, watch

SCRIPT = Path(__file__).parents[2] / "scripts" / "goals.py"


@pytest.fixture(scope="module")
def goals():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("goals", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["goals"] = module
    spec.loader.exec_module(module)
    return module


def test_the_next_writer_gets_the_pool_of_a_dead_one(tmp_path: Path) -> None:
    deaths = kill_holders(tmp_path, num_deaths=6)
    assert deaths.problems == []
    assert (deaths.num_deaths, deaths.num_readers) == (6, 1)


def test_readers_see_whole_snapshots_beside_a_writer_that_collects(tmp_path: Path) -> None:
    seen = watch(tmp_path, num_readers=2, seconds=1.5)
    assert seen.problems == []
    assert seen.num_generations > PERIOD
    assert seen.num_distinct > 2


def test_a_snapshot_of_other_scores_is_noticed(tmp_path: Path) -> None:
    with NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE) as pool:
        pool.append(numbered_batch(0))
        assert readers._compare(pool, History(), readers.random.Random(0)) == []
        pool.append(numbered_batch(2))
        (problem,) = readers._compare(pool, History(), readers.random.Random(0))
    assert "samples instead of" in problem or "other scores" in problem


def test_a_pool_opens_after_its_writer_was_killed(tmp_path: Path) -> None:
    assert open_after_crash(tmp_path, num_samples=25_000).num_samples >= 25_000


def test_counts_are_summed_and_failures_are_named(goals) -> None:
    output = "goal 2 images=5 double=1\ntest a ... ok\n\ngoal 2 images=7\ntest b ... FAILED\n"
    good = goals.counted((0, output.replace("FAILED", "ok")))
    assert (good.counts, good.failures) == ({"images": 12, "double": 1}, [])
    assert goals.counted((101, output)).failures == ["b"]
    assert goals.counted((101, "error: no such test")).failures == ["error: no such test"]


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ({"deaths": 10, "longest_s": 0.2}, None),
        ({"deaths": 9, "longest_s": 0.2}, "deaths is 9, not at least 10"),
        ({"deaths": 10, "longest_s": 2.0}, "longest_s is 2.0, not at most 1.0"),
        ({"longest_s": 0.2}, "deaths is None, not at least 10"),
    ],
)
def test_what_is_not_reached_is_said(goals, counts, problem) -> None:
    missed = goals.missed({"deaths": 10, "longest_s": 1.0}, counts)
    assert missed == ([] if problem is None else [problem])


def test_every_goal_is_in_the_table_of_the_documents(goals) -> None:
    table = (SCRIPT.parents[1] / "docs" / "reliability.md").read_text(encoding="utf-8")
    for row in goals.ROWS:
        assert f"\n| {row.number} | {row.promise} |" in table, row.number
