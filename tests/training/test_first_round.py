"""A run begins with the samples of another pool, and is a run like any other from then on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quark
from quark.errors import ConfigError, DataError
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.training.explain import explain
from tests.tiny import byte_tokenizer
from tests.training.tiny_run import Listener, end_of, train, write_inputs

NUM_SAMPLES = 24 + 12 + 12


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def source(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three rounds."""
    folder = tmp_path_factory.mktemp("source") / "run"
    train(config, folder)
    return folder


@pytest.fixture(scope="module")
def begun(config: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that began with the samples of ``source``."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    listener = Listener()
    train(config, folder, overrides=("run.num_rounds=2",), from_pool=source, listener=listener)
    assert f"info: round 0: 48 samples from {source}/pool, none of them generated again" in (
        listener.messages
    )
    return folder


def samples_of(folder: Path) -> list[Any]:
    with NativePool.open(RunDirectory(folder).pool) as pool:
        return pool.samples(range(len(pool)))


def test_the_first_round_is_what_the_pool_holds(source: Path, begun: Path) -> None:
    given, taken = samples_of(source), samples_of(begun)
    assert len(given) == NUM_SAMPLES
    assert len(taken) == NUM_SAMPLES + 12
    for theirs, ours in zip(given, taken, strict=False):
        for name in ("prompt_text", "completion_text", "finish_reason", "seed", "scores"):
            assert getattr(theirs, name) == getattr(ours, name)
        assert theirs.completion_tokens.tolist() == ours.completion_tokens.tolist()
        assert np.float32(theirs.logprob_sampled) == np.float32(ours.logprob_sampled)
        assert (ours.round, ours.policy_step, ours.reward_token) == (0, 0, -1)
    assert [sample.chunk for sample in taken[:NUM_SAMPLES]] == [0] * 16 + [1] * 16 + [2] * 16
    assert {sample.round for sample in taken[NUM_SAMPLES:]} == {1}
    with NativePool.open(RunDirectory(source).pool) as pool:
        said = {"uuid": pool.settings.uuid, "generation": pool.snapshot.generation}
    assert json.loads(taken[0].settings)["from_pool"] == said
    assert explain(begun, 3).rounds[0].snapshot.num_samples == NUM_SAMPLES


def test_an_interrupted_run_ends_with_the_same_bytes(
    config: Path, source: Path, begun: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(source, tmp_path / "source")
    stopped = train(
        config,
        tmp_path / "run",
        overrides=("run.num_rounds=2",),
        from_pool=copy,
        stop_at=12,
    )
    assert stopped.interrupted
    shutil.rmtree(copy)  # it is not needed any more
    train(config, tmp_path / "run", overrides=("run.num_rounds=2",), require_exact=True)
    whole, again = end_of(begun), end_of(tmp_path / "run")
    assert again == whole


def test_the_same_command_resumes_and_another_pool_is_refused(
    config: Path, source: Path, begun: Path, tmp_path: Path
) -> None:
    again = shutil.copytree(begun, tmp_path / "run")
    train(config, again, overrides=("run.num_rounds=2",), from_pool=source)
    with NativePool.open(RunDirectory(source).pool) as pool:
        pool.fork(tmp_path / "fork").close()
    with pytest.raises(ConfigError, match=r"began with another pool: leave out --from-pool"):
        train(config, again, overrides=("run.num_rounds=2",), from_pool=tmp_path / "fork")
    with pytest.raises(ConfigError, match=r"began with its own samples"):
        train(config, shutil.copytree(source, tmp_path / "own"), from_pool=tmp_path / "fork")
    with pytest.raises(ConfigError, match=r"is the pool of the run itself"):
        train(config, again, from_pool=again, fresh=True, force=True)


def test_a_first_round_that_was_not_copied_is_not_explored_instead(
    config: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object, **__: object) -> None:
        raise RuntimeError("cut off")

    run = RunDirectory(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("quark.training.assemble.copy_first_round", dies)
        with pytest.raises(RuntimeError, match="cut off"):
            train(config, run.path, from_pool=source)
    assert run.is_run()
    assert not run.pool.exists()
    with pytest.raises(ConfigError, match=r"was not copied yet: repeat the command with --from-p"):
        train(config, run.path)
    train(config, run.path, overrides=("run.num_rounds=1",), from_pool=source)
    assert len(samples_of(run.path)) == NUM_SAMPLES


@pytest.fixture
def pool(tmp_path: Path) -> quark.Pool:
    """An empty pool of the model's vocabulary."""
    return quark.Pool.create(tmp_path / "pool", tokenizer=byte_tokenizer())


def append(pool: quark.Pool, count: int, *, prompt: str = "say one", **columns: Any) -> None:
    rows = range(count)
    texts = {"prompt": [prompt] * count, "completion": [f"c{row}" for row in rows]}
    pool.append(**texts, **{"reward": [float(row) for row in rows], **columns})


def test_held_out_prompts_and_samples_without_use_are_left_out(
    config: Path, pool: quark.Pool, tmp_path: Path
) -> None:
    append(pool, 5)
    append(pool, 3, prompt="say a")  # which is held out
    pool.append(
        prompt=["say two", "say two"],
        completion=["x" * 500, ""],
        reward=[1.0, 2.0],
    )
    pool.close()
    listener = Listener()
    train(
        config,
        tmp_path / "run",
        overrides=("run.num_rounds=1",),
        from_pool=pool.path,
        listener=listener,
    )
    said = "\n".join(listener.messages)
    assert "3 samples of held-out prompts left out" in said
    assert "2 samples left out that the model cannot be trained on" in said
    assert "does not say which reward scored its samples" in said
    assert "has no score column 'length'" in said
    assert {sample.prompt_text for sample in samples_of(tmp_path / "run")} == {"say one"}


@pytest.mark.parametrize(
    ("columns", "count", "message"),
    [
        ({}, 2, r"has 2 samples for the first round, .* make 3 commits: lower the former to 2"),
        ({"reward": None, "style": [1.0] * 5}, 5, r"no score column 'reward': quark pool rescore"),
    ],
    ids=["too few", "no reward"],
)
def test_a_pool_that_makes_no_round_is_refused(
    config: Path,
    pool: quark.Pool,
    tmp_path: Path,
    columns: dict[str, Any],
    count: int,
    message: str,
) -> None:
    rows = {"prompt": ["say one"] * count, "completion": [f"c{n}" for n in range(count)]}
    rows |= {"reward": [0.5] * count} | columns
    pool.append(**{name: values for name, values in rows.items() if values is not None})
    pool.close()
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run", from_pool=pool.path)
    assert not (tmp_path / "run" / "pool").exists()


def test_samples_of_another_reward_or_model_are_refused(
    config: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"scored by another reward than length, and two scales"):
        train(config, tmp_path / "run", overrides=("reward.name=length",), from_pool=source)
    with quark.Pool.create(tmp_path / "other", vocab_size=50000) as pool:
        pool.append(prompt_tokens=[[1]], completion_tokens=[[2]], completion=["a"], reward=[1.0])
    with pytest.raises(DataError, match=r"vocabulary of 50000, .*: set model.name to the model"):
        train(config, tmp_path / "run", from_pool=tmp_path / "other")
