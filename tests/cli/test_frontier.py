"""``quark frontier`` on a tiny run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quark.run_directory import RunDirectory
from tests.cli.commands import quark


@pytest.fixture(scope="module")
def measured(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny run with a frontier, and guidance 1 or 4 picked."""
    copy = Path(shutil.copytree(run_dir, tmp_path_factory.mktemp("frontier") / "run"))
    done = quark("frontier", copy, "--guidance", "0,1,4", "--pick", "kl<=1000", "--json")
    assert done.code == 0, done.err
    (copy / "said.json").write_text(done.out)
    return copy


def test_every_token_and_every_strength_is_measured_with_intervals(measured: Path) -> None:
    said = json.loads((measured / "said.json").read_text())
    places = [(p["quantile"], p["guidance"]) for p in said["points"]]
    assert places == [(None, 0), (0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (4, 4)]
    for point in said["points"]:
        assert point["reward"]["low"] <= point["reward"]["mean"] <= point["reward"]["high"]
    original, guided = said["points"][0], said["points"][-1]
    assert original["drift"]["mean"] == 0.0
    assert guided["drift"]["mean"] > said["points"][-3]["drift"]["mean"] > 0
    curve = said["points"][-3:]
    assert said["picked"] == max(curve, key=lambda p: p["reward"]["mean"])["guidance"]
    assert said == {"run": str(measured), **json.loads(RunDirectory(measured).frontier.read_text())}


def test_a_point_without_guidance_is_what_evaluate_says(measured: Path) -> None:
    said = json.loads((measured / "said.json").read_text())
    evaluated = quark("evaluate", measured, "-q", "best", "--json").json["evaluations"][0]
    point = next(p for p in said["points"] if (p["quantile"], p["guidance"]) == (4, 0))
    assert point["reward"]["mean"] == pytest.approx(evaluated["reward_mean"])
    assert point["drift"]["mean"] == pytest.approx(evaluated["kl_sampled_per_completion"])
    assert point["drift_per_token"] == evaluated["kl_sampled_to_reference"]


def test_generate_takes_the_picked_strength_unless_it_is_given_one(measured: Path) -> None:
    picked = json.loads((measured / "said.json").read_text())["picked"]

    def guidance(*options: str) -> float:
        done = quark("generate", measured, "-p", "the", "--json", *options)
        return float(done.json["sampling"]["guidance"])

    assert guidance() == picked
    assert guidance("--guidance", "0.5") == 0.5
    # A new measurement without a pick takes it back.
    assert quark("frontier", measured, "--guidance", "0").code == 0
    assert guidance() == 0.0


def test_the_report_draws_it(measured: Path) -> None:
    page = Path(quark("report", measured, "--json").json["report"]).read_text()
    assert "Reward against drift" in page


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--guidance", "a,b"), "numbers from 0 upward"),
        (("--guidance", "-1"), "numbers from 0 upward"),
        (("--guidance", "inf"), "numbers from 0 upward"),
        (("--pick", "reward>=1"), 'write "kl<=3"'),
    ],
)
def test_bad_options_are_named(run_dir: Path, options: tuple[str, ...], says: str) -> None:
    refused = quark("frontier", run_dir, *options)
    assert refused.code == 2
    assert says in refused.err
    assert not RunDirectory(run_dir).frontier.exists()


def test_a_model_that_is_no_run_is_refused() -> None:
    refused = quark("frontier", "embedded:reviews")
    assert refused.code == 2
    assert "is not a run directory" in refused.err


def test_a_pick_that_nothing_fits_is_told_and_the_curve_is_kept(measured: Path) -> None:
    RunDirectory(measured).frontier.unlink()
    told = quark("frontier", measured, "--guidance", "1", "--pick", "kl<=0")
    assert told.code == 2
    assert "every strength drifts farther" in told.err
    assert json.loads(RunDirectory(measured).frontier.read_text())["picked"] is None
