"""A whole run whose completions a server samples: the weights reach it, and nothing secret stays behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quark.errors import ConfigError
from quark.pool.native import NativePool
from tests.generation.sampling_server import SamplingServer, serving
from tests.tiny import save_tiny, tiny_llama
from tests.training.launching import launch
from tests.training.tiny_run import (
    NEEDS_SHARDING,
    Listener,
    fingerprint_of,
    rows_of,
    train,
    write_inputs,
)

KEY = "s3cret-key"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = write_inputs(tmp_path / "inputs")
    shutil.rmtree(path.parent / "model")
    save_tiny(path.parent / "model", tiny_llama())
    return path


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SamplingServer, tuple[str, ...]]]:
    monkeypatch.setenv("QUARK_TEST_KEY", KEY)
    with serving() as (state, address):
        given = {"backend": "http", "http.api_key_env": "QUARK_TEST_KEY"}
        given |= {f"http.{key}": value for key, value in address.items()}
        overrides = tuple(f"sampling.{k}={json.dumps(v)}" for k, v in given.items())
        yield state, (*overrides, "run.num_rounds=2", "evaluation.control_curve=false")


def test_the_run_trains_on_what_the_server_sampled_from_each_round_s_weights(
    config: Path, served: tuple[SamplingServer, tuple[str, ...]], tmp_path: Path
) -> None:
    state, overrides = served
    run_dir = tmp_path / "run"
    listener = Listener()
    train(config, run_dir, overrides=overrides, listener=listener)
    # Before training, after round 0 (its evaluation and round 1's exploration), after round 1.
    names = [folder.name for folder in state.loaded]
    assert names[0] == "initial"
    assert len(names) == len(set(names)) == 3
    assert {path.name for path in (run_dir / "served").iterdir()} == {"initial", names[-1]}
    with NativePool.open(run_dir / "pool") as pool:
        samples = pool.samples(range(len(pool)))
        sampling = json.loads(samples[0].settings)["sampling"]
    assert (sampling["backend"], sampling["http"]["model"]) == ("http", "policy")
    assert [s.reward_token for s in samples] == [-1] * 24 + [2] * 12
    asked = {(tuple(body["prompt"]), body["seed"]) for body in state.requests}
    assert len(asked) >= len(samples)
    for sample in samples[:24]:
        # The original model, by the server's copy of it and by ours.
        assert sample.logprob_policy == pytest.approx(sample.logprob_reference, abs=1e-4)
    assert any(row["event"] == "end" for row in rows_of(run_dir))
    assert state.keys == {f"Bearer {KEY}"}
    for path in (p for p in run_dir.rglob("*") if p.is_file()):
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in repr(listener)


def test_the_server_samples_from_the_weights_that_a_hook_lends_for_sampling(
    config: Path, served: tuple[SamplingServer, tuple[str, ...]], tmp_path: Path
) -> None:
    state, overrides = served
    run_dir = tmp_path / "run"
    train(config, run_dir, overrides=(*overrides, "average.samples=ema", "average.decay=0.8"))
    checkpoint = sorted((run_dir / "checkpoints").iterdir())[-1]
    policy = load_file(checkpoint / "model.safetensors")
    average = load_file(checkpoint / "hooks.safetensors")
    loaded = load_file(state.loaded[-1] / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(loaded[name], average[f"average/{name}"])
    assert not torch.equal(loaded[name], policy[name])


def test_a_stopped_run_goes_on_with_a_server_that_was_started_anew(
    config: Path, served: tuple[SamplingServer, tuple[str, ...]], tmp_path: Path
) -> None:
    state, overrides = served
    train(config, tmp_path / "whole", overrides=overrides)
    lives = 1
    while train(config, tmp_path / "run", overrides=overrides, stop_at=14).interrupted:
        state.policy = None
        overrides = (*overrides, f"sampling.http.retries={lives}")
        lives += 1
        assert lives < 20
    assert lives > 1
    # This server keeps its promise about seeds, so that even what was sampled again is the same.
    found, expected = fingerprint_of(tmp_path / "run"), fingerprint_of(tmp_path / "whole")
    for key in ("weights", "samples", "rows"):
        assert found[key] == expected[key]


def test_learned_positions_that_begin_after_the_reward_token_are_refused(
    config: Path, served: tuple[SamplingServer, tuple[str, ...]], tmp_path: Path
) -> None:
    shutil.rmtree(config.parent / "model")
    save_tiny(config.parent / "model")
    with pytest.raises(ConfigError, match=r"model\.shift_positions = false"):
        train(config, tmp_path / "run", overrides=served[1])
    counted = (*served[1], "model.shift_positions=false")
    assert train(config, tmp_path / "other", overrides=counted, stop_at=4).interrupted
    assert served[0].requests


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["data", pytest.param("sharded", marks=NEEDS_SHARDING)])
def test_of_several_processes_one_asks_and_all_learn_from_the_answers(
    config: Path, served: tuple[SamplingServer, tuple[str, ...]], tmp_path: Path, parallel: str
) -> None:
    state, overrides = served
    overrides = (*overrides, "run.num_rounds=1", "run.steps_per_round=1")
    train(config, tmp_path / "alone", overrides=overrides)
    num_requests = len(state.requests)
    ended = launch(config, tmp_path / "together", *overrides, f"run.parallel={parallel}")
    assert ended.codes == [0, 0], ended.err
    assert len(state.requests) == 2 * num_requests
    samples = [fingerprint_of(tmp_path / name)["samples"] for name in ("alone", "together")]
    assert samples[0] == samples[1]
