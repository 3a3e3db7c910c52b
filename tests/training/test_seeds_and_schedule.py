from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quark.config.schema import OptimizerSection
from quark.errors import ConfigError
from quark.training.loop.optimization import learning_rate
from quark.training.loop.trackers import make_trackers
from quark.training.seeds import derive_seed


@given(st.integers(0, 2**63), st.text(max_size=8), st.lists(st.integers(0, 1000), max_size=3))
def test_a_seed_is_a_u64_that_depends_on_everything(
    seed: int, purpose: str, numbers: list[int]
) -> None:
    value = derive_seed(seed, purpose, *numbers)
    assert 0 <= value < 2**64
    assert value == derive_seed(seed, purpose, *numbers)
    others = {
        derive_seed(seed + 1, purpose, *numbers),
        derive_seed(seed, purpose + "x", *numbers),
        derive_seed(seed, purpose, *numbers, 0),
    }
    assert value not in others
    assert len(others) == 3


def test_deriving_seeds_leaves_the_global_generators_alone() -> None:
    state = torch.random.get_rng_state()
    derive_seed(0, "explore", 1, 2)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("constant", 1.0, 1.0), ("linear", 0.5, 0.1), ("cosine", 0.5, 0.0245)],
)
def test_schedules(schedule: str, middle: float, last: float) -> None:
    config = OptimizerSection.model_validate(
        {"learning_rate": 1.0, "warmup_steps": 4, "schedule": schedule}
    )
    rates = [learning_rate(config, step, 14) for step in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[9] == pytest.approx(middle)
    assert rates[13] == pytest.approx(last, abs=1e-3)


def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'wandb>="):
        make_trackers(["wandb"], tmp_path, project="p", run_id="r", config={})
