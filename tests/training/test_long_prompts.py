"""Prompts that the model's context has no room for."""

from __future__ import annotations

import pytest

from quark.config.load import load_config
from quark.errors import ConfigError
from quark.training.factories import prompts_of
from tests.tiny import save_tiny


def config_of(tmp_path, **settings):
    save_tiny(tmp_path / "model")
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(20)) + "long " * 2000 + "\n")
    values = {
        "model.name": str(tmp_path / "model"),
        "prompts.source": str(path),
        "prompts.max_tokens": "20000",
        "prompts.num_evaluation": "4",
        "sampling.max_new_tokens": "16",
    }
    pairs = [f"{key}={value}" for key, value in (values | settings).items()]
    return load_config(None, overrides=pairs).config


def test_one_prompt_of_ten_thousand_tokens_stops_no_run(tmp_path):
    found = prompts_of(config_of(tmp_path))
    assert len(found.train) + len(found.evaluation) == 21
    assert max(len(prompt.token_ids) for prompt in (*found.train, *found.evaluation)) == 48
    assert [note for note in found.notes if "the model's context leaves" in note] == [
        "1 prompt cut to the last 48 tokens, which the model's context leaves"
    ]
    skipped = prompts_of(config_of(tmp_path, **{"prompts.over_long": "skip"}))
    assert len(skipped.train) + len(skipped.evaluation) == 20
    assert any("1 prompt left out: over 48 tokens" in note for note in skipped.notes)


def test_a_completion_that_fills_the_context_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="leaves no room for a prompt in the 64 tokens"):
        prompts_of(config_of(tmp_path, **{"sampling.max_new_tokens": "64"}))
