from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from quark.errors import QuarkError
from quark.evaluation.frontier import Interval, Point, best_within
from quark.evaluation.frontier_file import FrontierFile
from quark.run_directory import RunDirectory

NOTHING = Interval(mean=math.nan, low=math.nan, high=math.nan)


def point(quantile: int | None, guidance: float, reward: float, drift: float) -> Point:
    return Point(
        quantile=quantile,
        guidance=guidance,
        reward=Interval(mean=reward, low=reward - 0.1, high=reward + 0.1),
        drift=Interval(mean=drift, low=drift, high=drift),
        drift_per_token=drift / 10,
        judges={"vader": NOTHING},
        distinct_2=0.9,
        length=10.0,
        perplexity=30.0,
    )


POINTS = (
    point(None, 0.0, 0.99, 0.0),
    point(2, 0.0, 0.5, 1.0),
    point(2, 1.0, 0.8, 2.5),
    point(2, 2.0, 0.7, 2.9),
    point(2, 4.0, 0.9, 6.0),
)


def test_the_best_point_within_a_drift_is_never_the_original_model() -> None:
    assert best_within(POINTS, most_drift=3.0) == POINTS[2]
    assert best_within(POINTS, most_drift=6.0) == POINTS[4]
    assert best_within(POINTS, most_drift=0.5) is None


def test_an_interval_is_of_prompts_and_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    num_covered = 0
    for _ in range(200):
        prompts = rng.normal(0.0, 1.0, 60)
        completions = (prompts[:, None] + rng.normal(0.0, 0.1, (60, 4))).ravel()
        interval = Interval.of(completions, per_prompt=4)
        assert interval.low < interval.mean < interval.high
        num_covered += interval.low <= 0.0 <= interval.high
    # Completions of one prompt are alike: an interval over completions would be half as wide.
    assert 0.88 <= num_covered / 200 <= 0.99


def test_completions_without_a_score_do_not_count() -> None:
    values = np.array([1.0, math.nan, 3.0, 5.0, math.nan, math.nan], dtype=np.float32)
    assert Interval.of(values, per_prompt=2).mean == pytest.approx((1.0 + 4.0) / 2)
    nothing = Interval.of(np.full(4, math.nan), per_prompt=2)
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.low)


def test_a_frontier_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert FrontierFile.read(run) is None
    written = FrontierFile(reward="sentiment", num_prompts=7, points=POINTS, picked=1.0)
    written.write(run)
    read = FrontierFile.read(run)
    assert read is not None
    assert str(read) == str(written)  # NaN does not equal itself
    dataclasses.replace(written, picked=None).write(run)
    assert FrontierFile.read(run).picked is None  # type: ignore[union-attr]
    assert [path.name for path in tmp_path.iterdir()] == ["frontier.json"]


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "{",
        '{"format_version": 1}',
        '{"format_version": "2"}',
        '{"format_version": 1, "reward": "x", "num_prompts": 1, "points": [3], "picked": null}',
        "[" * 100_000,
    ],
)
def test_a_damaged_frontier_is_named_with_the_way_out(tmp_path: Path, damage: str) -> None:
    run = RunDirectory(tmp_path)
    run.frontier.write_text(damage)
    with pytest.raises(QuarkError, match=r"frontier.json is damaged .*quark frontier"):
        FrontierFile.read(run)


def test_a_frontier_of_a_newer_quark_is_not_called_damaged(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    FrontierFile(reward="x", num_prompts=1, points=POINTS, picked=None).write(run)
    said = json.loads(run.frontier.read_text())
    run.frontier.write_text(json.dumps(said | {"format_version": 2}))
    with pytest.raises(QuarkError, match=r"frontier.json was written by a newer quark"):
        FrontierFile.read(run)
    del said["format_version"]
    run.frontier.write_text(json.dumps(said))
    assert FrontierFile.read(run) is not None


def test_figures_that_no_chart_has_room_for_are_damage(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    FrontierFile(reward="x", num_prompts=1, points=POINTS, picked=None).write(run)
    said = json.loads(run.frontier.read_text())
    said["points"][0]["drift"]["mean"] = 1e300
    run.frontier.write_text(json.dumps(said))
    with pytest.raises(QuarkError, match="no figure"):
        FrontierFile.read(run)


def test_a_link_or_pipe_in_its_place_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    run.frontier.symlink_to(outside)
    with pytest.raises(QuarkError, match="link"):
        FrontierFile.read(run)
    run.frontier.unlink()
    os.mkfifo(run.frontier)
    with pytest.raises(QuarkError):
        FrontierFile.read(run)
