"""An alert says once what has begun to be wrong, and stops nothing unless it is told to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quark.config.schema import AlertsSection
from quark.errors import TrainingError
from quark.training.loop.alerts import Alerts, ControlGap
from quark.training.state.run_state import AlertsState
from tests.training.tiny_run import (
    NUM_ROUNDS,
    Listener,
    fingerprint_of,
    rows_of,
    train,
    write_inputs,
)

BASELINE = {"distinct_2": 0.8}
FINE: Mapping[str, Any] = {
    "new_samples": 100,
    "failed_scores": 0,
    "kl_policy_to_reference_mean": 0.5,
    "evaluation_kl_policy_to_reference": 0.5,
    "evaluation_distinct_2": 0.7,
}


def kinds(alerts: Alerts, gap: float | None = None, **figures: Any) -> list[str]:
    measured = None if gap is None else ControlGap(value=gap, error=0.01)
    found = alerts.check({**FINE, **figures}, baseline=BASELINE, gap=measured)
    assert all(alert.text for alert in found)
    return [alert.kind for alert in found]


def information(value: float, which: str = "fresh") -> dict[str, float]:
    return {f"information_{which}": value, f"information_error_{which}": 0.05}


@pytest.mark.parametrize(
    ("figures", "kind"),
    [
        ({"evaluation_kl_policy_to_reference": 2.1}, "kl"),
        ({"failed_scores": 6}, "failed_scores"),
        ({"evaluation_distinct_2": 0.39}, "diversity"),
    ],
)
def test_what_crosses_its_bound_is_told_when_it_begins(figures: dict[str, Any], kind: str) -> None:
    alerts = Alerts(AlertsSection())
    assert kinds(alerts) == []
    assert kinds(alerts, **figures) == [kind]
    assert kinds(alerts, **figures) == []
    assert kinds(alerts) == []
    assert kinds(alerts, **figures) == [kind]


def test_the_kl_of_the_steps_counts_where_there_was_no_evaluation() -> None:
    figures = {"new_samples": 1, "failed_scores": 0, "kl_policy_to_reference_mean": 3.0}
    (alert,) = Alerts(AlertsSection()).check(figures, baseline={}, gap=None)
    assert (alert.kind, alert.value, alert.bound) == ("kl", 3.0, 2.0)


def test_a_round_without_an_evaluation_neither_ends_nor_repeats_an_alert() -> None:
    alerts = Alerts(AlertsSection())
    assert kinds(alerts, evaluation_distinct_2=0.1) == ["diversity"]
    assert kinds(alerts, evaluation_distinct_2=math.nan) == []
    assert kinds(alerts, evaluation_distinct_2=0.1) == []


def test_what_is_switched_off_never_warns() -> None:
    section = AlertsSection(
        kl_above=0,
        failed_share_above=1,
        distinct_2_below=0,
        control_gap_below=0,
        flat_evaluations=0,
        information_below=0,
    )
    alerts = Alerts(section)
    worst = {
        "evaluation_kl_policy_to_reference": 99.0,
        "failed_scores": 100,
        "evaluation_distinct_2": 0.0,
        **information(-1.0),
    }
    for gap in (1.0, 0.0, 0.0, 0.0, 0.0):
        assert kinds(alerts, gap, **worst) == []


def test_a_control_curve_that_was_there_and_is_gone_has_collapsed() -> None:
    alerts = Alerts(AlertsSection(flat_evaluations=2))
    assert [kinds(alerts, gap) for gap in (0.1, 0.5, 0.2, 0.04, 0.0, 0.3)] == [
        [], [], [], ["control_curve_collapsed"], [], [],
    ]  # fmt: skip


def test_a_control_curve_that_never_was_there_is_flat() -> None:
    alerts = Alerts(AlertsSection(flat_evaluations=3))
    assert [kinds(alerts, gap) for gap in (0.01, -0.2, 0.019, 0.0, 0.2)] == [
        [], [], ["control_curve_flat"], [], [],
    ]  # fmt: skip


def test_tokens_that_spoke_of_new_samples_and_no_longer_do_have_collapsed() -> None:
    alerts = Alerts(AlertsSection())
    told = [kinds(alerts, **information(value)) for value in (0.2, 0.6, 0.07, 0.05, -0.1, 0.3)]
    assert told == [[], [], [], ["information_collapsed"], [], []]


def test_tokens_that_never_spoke_of_new_samples_are_flat() -> None:
    alerts = Alerts(AlertsSection(flat_evaluations=3))
    told = [kinds(alerts, **information(value)) for value in (-0.2, -0.1, 0.01, -1, -1, 0, -1, 0.5)]
    assert told == [[], [], [], [], [], ["information_flat"], [], []]


def test_held_out_samples_count_before_new_ones() -> None:
    alerts = Alerts(AlertsSection(flat_evaluations=1))
    both = information(0.4, "fresh") | information(-0.3, "held_out")
    (alert,) = alerts.check({**FINE, **both}, baseline=BASELINE, gap=None)
    assert (alert.kind, alert.value) == ("information_flat", -0.3)
    assert "held-out samples" in alert.text


@pytest.mark.parametrize(("correlation", "said"), [(0.8, "too sure"), (0.1, "by heart")])
def test_the_way_out_depends_on_whether_the_tokens_order_the_samples(
    correlation: float, said: str
) -> None:
    figures = {**FINE, **information(-0.3), "rank_correlation_fresh": correlation}
    alerts = Alerts(AlertsSection(flat_evaluations=1))
    (alert,) = alerts.check(figures, baseline=BASELINE, gap=None)
    assert said in alert.text


def test_a_round_that_did_not_measure_information_neither_ends_nor_repeats_an_alert() -> None:
    alerts = Alerts(AlertsSection(flat_evaluations=1))
    assert kinds(alerts, **information(-0.1)) == ["information_flat"]
    assert kinds(alerts, **information(math.nan)) == []
    assert kinds(alerts, **information(-0.1)) == []


def test_the_state_of_before_there_was_information_loads() -> None:
    alerts = Alerts(AlertsSection())
    alerts.restore(AlertsState(largest_gap=0.5, num_gaps=1))
    assert kinds(alerts, 0.01, **information(0.5)) == ["control_curve_collapsed"]


def test_the_state_carries_over() -> None:
    before, after = Alerts(AlertsSection()), Alerts(AlertsSection())
    kinds(before, 0.5, failed_scores=50, **information(0.5))
    after.restore(before.state())
    assert kinds(after, 0.01, failed_scores=50, **information(0.0)) == [
        "information_collapsed",
        "control_curve_collapsed",
    ]


def test_quantiles_that_too_few_completions_of_a_prompt_leave_empty_are_told_once() -> None:
    alerts = Alerts(AlertsSection())

    def kinds_of(counts: list[int], most: int) -> list[str]:
        found = alerts.check_quantiles(np.array(counts), most_of_a_prompt=most)
        return [alert.kind for alert in found]

    assert kinds_of([3, 0, 4], 3) == []  # by ties
    assert kinds_of([9, 0, 4], 2) == ["empty_quantile"]
    assert kinds_of([9, 0, 5], 2) == []
    assert kinds_of([9, 1, 5], 3) == []
    assert kinds_of([9, 0, 5], 2) == ["empty_quantile"]


def test_the_gap_knows_its_noise_and_leaves_out_what_is_not_scored() -> None:
    chance = np.random.default_rng(0)
    best = chance.normal(1.0, 1.0, 400).astype(np.float32)
    worst = chance.normal(0.0, 1.0, 400).astype(np.float32)
    best[::7] = np.nan
    gap = ControlGap.between(best, worst)
    assert gap.value == pytest.approx(1.0, abs=0.2)
    assert gap.error == pytest.approx(math.sqrt(1 / 343 + 1 / 400), rel=0.1)
    assert gap.is_clear
    assert not ControlGap.between(worst, worst).is_clear
    assert math.isnan(ControlGap.between(np.full(3, np.nan, np.float32), worst).value)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_an_alert_warns_and_is_logged_and_the_run_goes_on(config: Path, tmp_path: Path) -> None:
    listener = Listener()
    result = train(config, tmp_path / "run", overrides=("alerts.kl_above=1e-6",), listener=listener)
    assert result.rounds == NUM_ROUNDS
    rows = [r for r in rows_of(tmp_path / "run") if r["event"] == "alert" and r["kind"] == "kl"]
    assert [(r["round"], r["bound"]) for r in rows] == [(0, 1e-6)]
    assert rows[0]["value"] > 1e-6
    assert [m for m in listener.messages if "alerts.kl_above" in m] == [
        f"warning: {rows[0]['text']}"
    ]
    gaps = [r.get("control_gap") for r in rows_of(tmp_path / "run") if r["event"] == "round"]
    assert [gap is None for gap in gaps] == [False, False, True]


def test_an_alert_stops_where_asked_and_the_rest_of_the_run_is_the_same(
    config: Path, tmp_path: Path
) -> None:
    bound = "alerts.kl_above=1e-6"
    train(config, tmp_path / "whole", overrides=(bound,))
    stopping = (bound, "alerts.stop=true", "checkpoint.every_rounds=2")
    with pytest.raises(TrainingError, match=r"alerts\.stop is set.*step 4 was written"):
        train(config, tmp_path / "run", overrides=stopping)
    assert train(config, tmp_path / "run", overrides=stopping).rounds == NUM_ROUNDS
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(tmp_path / "whole")


def test_what_is_wrong_with_the_first_scores_is_told_before_the_first_step(
    tmp_path: Path,
) -> None:
    """Scores that are constant as float32, and quantiles that one completion for each prompt cannot fill."""
    config = write_inputs(tmp_path)
    reward = tmp_path / "tiny_reward.py"
    reward.write_text(
        "def huge(prompts, completions):\n    return [1e9 + 0.001 * len(text) for text in completions]\n"
    )
    overrides = (
        f"reward.name={reward}:huge",
        "pool.per_prompt=true",
        "run.num_rounds=2",
        "run.steps_per_round=1",
        "run.prompts_first_round=7",
        "run.prompts_per_round=7",
    )
    listener = Listener()
    train(config, tmp_path / "run", overrides=overrides, listener=listener)
    told = {
        about: [message for message in listener.messages if about in message]
        for about in ("stored as float32", "the reward is constant", "no sample is in quantile")
    }
    assert {about: len(messages) for about, messages in told.items()} == dict.fromkeys(told, 1)
    assert "of the scores tie with others" in told["stored as float32"][0]
    assert "run.completions_per_prompt to 3" in told["no sample is in quantile"][0]
    first_step = next(
        number for number, row in enumerate(rows_of(tmp_path / "run")) if row["event"] == "step"
    )
    before = [row for row in rows_of(tmp_path / "run")[:first_step] if row["event"] == "alert"]
    assert [row["kind"] for row in before] == ["constant_reward", "empty_quantile"]
