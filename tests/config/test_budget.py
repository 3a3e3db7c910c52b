from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quark.config.budget import SMALLEST_ROUND, load_within
from quark.errors import ConfigError


@given(budget=st.integers(1, 200_000), per_prompt=st.integers(1, 16))
def test_a_run_scores_the_budget_and_no_more(budget: int, per_prompt: int) -> None:
    overrides = [f"run.completions_per_prompt={per_prompt}"]
    if budget < per_prompt:
        with pytest.raises(ConfigError, match="completions_per_prompt"):
            load_within("demo", overrides, budget=budget)
        return
    section = load_within("demo", overrides, budget=budget).config.run
    prompts = section.prompts_first_round + (section.num_rounds - 1) * section.prompts_per_round
    assert budget - per_prompt < prompts * per_prompt <= budget
    assert section.prompts_first_round >= section.prompts_per_round
    if budget >= 2 * SMALLEST_ROUND:
        assert section.num_rounds > 1


def test_it_says_what_it_chose_and_leaves_the_steps_to_the_user() -> None:
    loaded = load_within("demo", ["run.steps_per_round=5"], budget=1000)
    assert loaded.config.run.steps_per_round == 5
    assert loaded.origins["run.steps_per_round"] == "--set"
    assert loaded.origins["run.num_rounds"] == "--budget"
    chosen = load_within("demo", [], budget=1000)
    assert chosen.origins["run.steps_per_round"] == "--budget"


@pytest.mark.parametrize(
    "key", ["run.num_rounds", "run.prompts_first_round", "run.prompts_per_round"]
)
def test_what_it_chooses_cannot_be_set_beside_it(key: str) -> None:
    with pytest.raises(ConfigError, match=f"--budget chooses {key}"):
        load_within("demo", [f"{key}=3"], budget=1000)
