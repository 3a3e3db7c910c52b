"""A training of two short rounds."""

from __future__ import annotations

from typing import Any

PROMPTS = [
    f"say {word}" for word in ["one", "two", "three", "four", "five", "six", "seven", "eight"]
]
SMALL: dict[str, Any] = {
    "num_rounds": 2,
    "steps_per_round": 2,
    "prompts_first_round": 8,
    "prompts_per_round": 8,
    "num_threads": 1,
    "device": "cpu",
    "num_quantiles": 2,
    "num_evaluation": 3,
    "max_new_tokens": 4,
    "control_curve": False,
    "optimizer": {"batch_size": 4, "learning_rate": 1e-3},
}
