"""Prompts that the model's context has no room for."""

from __future__ import annotations

import json

import pytest

from quark.config.load import load_config
from quark.errors import ConfigError
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.training.factories import prompts_of
from tests.tiny import save_tiny
from tests.training.tiny_run import Listener, train, write_inputs


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


def test_a_run_with_such_a_prompt_among_a_thousand_goes_on_with_one_line_about_it(tmp_path):
    config = write_inputs(tmp_path)
    rows = [{"prompt": f"say {number}"} for number in range(1000)] + [{"prompt": "long " * 2000}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    listener = Listener()
    overrides = (
        "prompts.max_tokens=20000",
        "run.num_rounds=1",
        "run.steps_per_round=1",
        "run.prompts_first_round=1001",
        "run.chunk_size=256",
        "sampling.batch_size=256",
        "sampling.max_new_tokens=1",
    )
    result = train(config, tmp_path / "run", overrides=overrides, listener=listener)
    assert not result.interrupted
    with NativePool.open(RunDirectory(tmp_path / "run").pool) as pool:
        lengths = [len(sample.prompt_tokens) for sample in pool.samples(range(len(pool)))]
    assert sorted(lengths)[-2:] == [7, 63]
    assert [m for m in listener.messages if "63 tokens" in m] == [
        "warning: 1 prompt cut to the last 63 tokens, which the model's context leaves"
    ]


def test_a_completion_that_fills_the_context_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="leaves no room for a prompt in the 64 tokens"):
        prompts_of(config_of(tmp_path, **{"sampling.max_new_tokens": "64"}))
