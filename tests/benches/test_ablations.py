"""The rows of the ablation bench are configurations, and its claims follow the means."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quark.config.load import load_config

FILE = Path(__file__).parents[2] / "benches" / "ablations.py"


@pytest.fixture(scope="module")
def ablations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablations", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablations"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_row_is_a_configuration_of_the_paper_s_preset(ablations: ModuleType) -> None:
    for run in ablations.RUNS:
        if run.name != "random reward":  # code of one's own is allowed on the command line
            load_config("demo-paper", run.settings)


def test_claims_follow_the_means(ablations: ModuleType) -> None:
    row = {"sentiment_before": 0.4, "sentiment_after": 0.9, "distinct_2_after": 0.8, "seconds": 1.0}
    means = {run.name: {**row, "kl_policy_to_reference": 0.5} for run in ablations.RUNS}
    means["beta=0"]["kl_policy_to_reference"] = 0.9
    means["beta=0.5"]["kl_policy_to_reference"] = 0.1
    means["K=1"]["sentiment_after"] = means["random reward"]["sentiment_after"] = 0.41
    means["best quantile only"]["distinct_2_after"] = 0.5
    assert all(ablations.verdicts(means, "demo-paper").values())
    means["K=1"]["sentiment_after"] = 0.8
    failed = [
        claim for claim, holds in ablations.verdicts(means, "demo-paper").items() if not holds
    ]
    assert failed == ["K=1 gains less than a fifth of the preset's gain"]
    assert ablations.spread([{"a": 1.0}, {"a": 2.0}], "a") == "1.500 (1.000–2.000)"
