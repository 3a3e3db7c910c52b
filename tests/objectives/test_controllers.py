from __future__ import annotations

import pytest

from quark.objectives.controllers import AdaptiveCoefficient, FixedCoefficient


def test_fixed_stays_and_restores():
    coefficient = FixedCoefficient(0.05)
    coefficient.update(100.0, num_sequences=128)
    assert coefficient.value == 0.05
    other = FixedCoefficient(1.0)
    other.load_state_dict(coefficient.state_dict())
    assert other.value == 0.05


def test_a_penalty_grows_above_its_target_by_ziegler_s_rule():
    coefficient = AdaptiveCoefficient(0.05, target=3.0, horizon=2500.0)
    coefficient.update(3.3, num_sequences=125)
    assert coefficient.value == pytest.approx(0.05 * (1 + 0.1 * 125 / 2500))


def test_the_error_is_clipped_at_a_fifth():
    up = AdaptiveCoefficient(0.05, target=3.0, horizon=1000.0)
    up.update(300.0, num_sequences=100)
    assert up.value == pytest.approx(0.05 * 1.02)
    down = AdaptiveCoefficient(0.05, target=3.0, horizon=1000.0)
    down.update(0.0, num_sequences=100)
    assert down.value == pytest.approx(0.05 * 0.98)


def test_a_bonus_grows_below_its_target():
    coefficient = AdaptiveCoefficient(0.06, target=40.0, horizon=1000.0, grows_when="below")
    coefficient.update(36.0, num_sequences=100)
    assert coefficient.value == pytest.approx(0.06 * 1.01)


def test_a_horizon_shorter_than_a_step_does_not_end_the_adaptation():
    coefficient = AdaptiveCoefficient(0.05, target=3.0, horizon=10.0)
    coefficient.update(0.0, num_sequences=1000)
    assert coefficient.value == pytest.approx(0.04)
    coefficient.update(30.0, num_sequences=1000)
    assert coefficient.value == pytest.approx(0.048)


def test_it_restores():
    other = AdaptiveCoefficient(0.05, target=3.0, horizon=10.0)
    other.load_state_dict({"value": 0.2})
    assert other.state_dict() == {"value": 0.2}
