"""Chooses prompts, rounds and steps for a given number of scored samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from quark.config.load import LoadedConfig, load_config
from quark.errors import ConfigError

NUM_EXPLORATIONS = 16
"""Maximum: new samples under the best token are worth more than many steps on old ones, and each
round takes time."""
SMALLEST_ROUND = 64
"""Samples."""
USES = 3
"""Average number of times that a sample is drawn; twice as many gained nothing in benches/frontier.py."""
_CHOSEN = ("run.num_rounds", "run.prompts_first_round", "run.prompts_per_round")


def load_within(source: str, overrides: Sequence[str], *, budget: int) -> LoadedConfig:
    """A configuration whose run scores ``budget`` samples in all.

    Chooses ``run.num_rounds``, ``run.prompts_first_round``, ``run.prompts_per_round``, and
    ``run.steps_per_round`` where no override gives it. The first round also takes what does not
    divide evenly.

    Args:
        source: a preset's name or a TOML file.
        overrides: ``key=value``; none of the first three keys.
        budget: scored samples; rounded down to whole prompts.

    Raises:
        ConfigError: an override names a key that the budget chooses, or the budget is less than one prompt's
            completions.
    """
    given = {text.partition("=")[0].strip() for text in overrides}
    for key in _CHOSEN:
        if key in given:
            raise ConfigError(f"--budget chooses {key}: leave out --set {key}, or --budget")
    config = load_config(source, overrides).config
    per_prompt = config.run.completions_per_prompt
    if budget < per_prompt:
        raise ConfigError(
            f"--budget {budget} is less than run.completions_per_prompt = {per_prompt}: raise the budget or lower that setting"
        )
    num_prompts = budget // per_prompt
    wanted = max(SMALLEST_ROUND, budget // NUM_EXPLORATIONS)
    prompts = min(num_prompts, max(1, wanted // per_prompt))
    num_rounds = num_prompts // prompts
    steps = max(1, round(USES * prompts * per_prompt / config.optimizer.batch_size))
    chosen = {
        "run.num_rounds": num_rounds,
        "run.prompts_first_round": num_prompts - (num_rounds - 1) * prompts,
        "run.prompts_per_round": prompts,
        "run.steps_per_round": steps,
    }
    settings = [f"{key}={value}" for key, value in chosen.items() if key not in given]
    loaded = load_config(source, (*overrides, *settings))
    origins = {key: "--budget" for key in chosen if key not in given}
    return dataclasses.replace(loaded, origins={**loaded.origins, **origins})
