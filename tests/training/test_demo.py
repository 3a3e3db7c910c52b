from __future__ import annotations

from pathlib import Path

import pytest

from quark.config.load import load_config
from quark.training.assemble import assemble
from tests.training.tiny_run import Listener


@pytest.mark.slow
def test_four_rounds_of_the_demo_raise_the_reward_and_order_the_tokens(tmp_path: Path) -> None:
    loaded = load_config("demo", ["run.num_rounds=4"])
    result = assemble(loaded, tmp_path / "run", listener=Listener()).run()
    assert result.reward_before < 0.55
    assert result.reward_after > result.reward_before + 0.25
    assert result.control_curve[-1] > result.control_curve[2] > result.control_curve[0]
    assert result.metrics["vader_after"] > result.metrics["vader_before"] + 0.1
    assert result.kl_reference_to_policy < 1.0
    assert result.metrics["distinct_2_after"] > 0.6
