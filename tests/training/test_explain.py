"""What is said about a sample afterwards is what the trainer did with it."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quark.errors import RunDirectoryError
from quark.pool.base import PoolBatch, PromptRecord
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.training.explain import Explanation, explain
from quark.training.loop.learner import Learner
from quark.training.loop.metrics import num_steps_logged
from quark.training.position import Position
from tests.cli.commands import quark
from tests.pool.batches import make_batch
from tests.training.tiny_run import NUM_ROUNDS, STEPS_PER_ROUND, train, write_inputs

Record = dict[int, PoolBatch]
"""Optimizer step -> the batch that it learnt from."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    """Every batch that trainers learn from while the test runs."""
    batches: Record = {}
    learn = Learner.step

    def recording(learner: Learner, samples: PoolBatch, position: Position) -> object:
        batches[position.step] = samples
        return learn(learner, samples, position)

    monkeypatch.setattr(Learner, "step", recording)
    return batches


def explain_all(run_dir: Path) -> list[Explanation]:
    with NativePool.open(RunDirectory(run_dir).pool) as pool:
        return [explain(run_dir, sample_id) for sample_id in range(len(pool))]


def assert_says_what_happened(explanations: list[Explanation], record: Record) -> None:
    steps: dict[int, set[int]] = defaultdict(set)
    for step, batch in record.items():
        for sample_id, quantile in zip(batch.ids.tolist(), batch.quantiles.tolist(), strict=True):
            steps[sample_id].add(step)
            use = {use.round: use for use in explanations[sample_id].rounds}[
                step // STEPS_PER_ROUND
            ]
            assert use.quantile == quantile
    for sample_id, explanation in enumerate(explanations):
        assert explanation.sample.id == sample_id
        said = [step for use in explanation.rounds for step in use.steps]
        assert said == sorted(steps[sample_id])


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("pool.train_quantiles=best", "pool.ties=older_first", "pool.remainder=lowest"),
        ("pool.sampling=iid", "pool.ties=together", "run.completions_per_prompt=2"),
        ("pool.sampling=shuffle", "run.seed=4", "run.chunk_size=5"),
        ("pool.last_rounds=1", "pool.where='reward > -1000'"),
        ("pool.per_prompt=true", "run.completions_per_prompt=3"),
        ("pool.min_score=-1000", "pool.max_per_round=7", "pool.bucket_window=2"),
        ("pool.held_out_share=0.3", "run.seed=5", "run.completions_per_prompt=2"),
        ("pool.age_half_life=0.5", "pool.max_uses=4", "run.completions_per_prompt=2"),
    ],
    ids=" ".join,
)
def test_every_batch_of_every_sample_is_recomputed(
    config: Path, record: Record, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    train(config, tmp_path / "run", overrides=overrides)
    assert len(record) == NUM_ROUNDS * STEPS_PER_ROUND
    explanations = explain_all(tmp_path / "run")
    assert_says_what_happened(explanations, record)
    for explanation in explanations:
        sample = explanation.sample
        assert [use.round for use in explanation.rounds] == list(range(sample.round, NUM_ROUNDS))
        assert not any(use.steps_to_come for use in explanation.rounds)
        assert explanation.key.endswith(f"/{sample.round}/{sample.chunk}")


def test_after_interruptions_and_a_lost_checkpoint_too(
    config: Path, record: Record, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert train(config, run_dir, stop_at=15).interrupted
    interrupted = explain_all(run_dir)
    assert_says_what_happened(interrupted, record)
    assert (taken := len(record)) % STEPS_PER_ROUND > 0, "it stopped inside a round"
    to_come = {step for e in interrupted for use in e.rounds for step in use.steps_to_come}
    assert to_come == set(range(taken, 2 * STEPS_PER_ROUND))
    train(config, run_dir)
    assert_says_what_happened(explain_all(run_dir), record)
    shutil.rmtree(max(RunDirectory(run_dir).checkpoints.iterdir()))
    before = dict(record)
    record.clear()
    train(config, run_dir)  # the pool is ahead of the checkpoint that it goes on from
    assert 0 < len(record) < len(before)
    assert_says_what_happened(explain_all(run_dir), before | record)


def test_samples_from_elsewhere_in_the_pool_do_not_confuse_it(
    config: Path, record: Record, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    train(config, run_dir, overrides=("run.num_rounds=1",))
    with NativePool.open(RunDirectory(run_dir).pool, writable=True) as pool:
        mine = make_batch("mine", {"reward": [9.0]}, content=1)
        prompts = [PromptRecord(token_ids=np.array([1], np.uint32), text="mine")] * 3
        tokens = mine.completion_tokens % 256
        (foreign,) = pool.append(replace(mine, prompts=prompts, completion_tokens=tokens))
    assert explain(run_dir, foreign).rounds == ()
    assert explain(run_dir, foreign).key == "mine"
    train(config, run_dir)
    explanations = explain_all(run_dir)
    assert_says_what_happened(explanations, record)
    assert [use.round for use in explanations[foreign].rounds] == [1, 2]


def test_standings_count_samples(tmp_path: Path) -> None:
    nan = float("nan")
    with NativePool.create(tmp_path / "pool", vocab_size=1000) as pool:
        scores = {"reward": [0.5, 2.0, 0.5, nan, 1.0], "judge": [nan] * 5}
        pool.append(make_batch("a", scores))
        labels = pool.quantize(2).labels()
    for sample_id, (rank, tied) in enumerate([(3, 2), (1, 1), (3, 2), (None, 0), (2, 1)]):
        explanation = explain(tmp_path / "pool", sample_id, num_quantiles=2)
        judge, reward = sorted(explanation.standings, key=lambda standing: standing.column)
        assert (reward.rank, reward.num_tied, reward.num_scored) == (rank, tied, 4)
        assert reward.quantile == labels[sample_id]
        assert reward.score == scores["reward"][sample_id] or np.isnan(reward.score)
        assert (judge.rank, judge.num_tied, judge.num_scored, judge.quantile) == (None, 0, 0, -1)
    assert explanation.run is None
    assert explanation.rounds == ()
    assert explanation.key == "a"
    assert explain(tmp_path / "pool", 0).num_quantiles == 5
    for missing in (5, -1, 2**70):
        with pytest.raises(IndexError, match=f"no sample {missing}; it holds 5"):
            explain(tmp_path / "pool", missing)


def test_a_pool_inside_its_run_is_the_run_and_a_copy_is_not(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    train(config, run_dir, overrides=("run.num_rounds=1",))
    whole = explain(run_dir, 3)
    assert whole.rounds
    assert whole.num_quantiles == 3
    assert explain(run_dir / "pool", 3).rounds == whole.rounds
    monkeypatch.chdir(run_dir / "pool")
    assert explain(Path(), 3).rounds == whole.rounds
    copy = shutil.copytree(run_dir / "pool", run_dir / "copy")
    alone = explain(copy, 3)
    assert (alone.run, alone.rounds) == (None, ())
    assert alone.key == whole.key


def test_rounds_whose_snapshot_is_gone_are_counted(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(config, run_dir)
    whole = explain(run_dir, 3)
    rescored = shutil.copytree(run_dir, tmp_path / "rescored")
    with NativePool.open(run_dir / "pool", writable=True) as pool:
        pool.gc(keep_snapshots=1)
    left = explain(run_dir, 3)
    # The last round's samples are all there with the scores that they had: it is known.
    assert [use.round for use in left.rounds] == [2]
    assert left.rounds[0].steps == whole.rounds[2].steps
    assert (whole.num_rounds_unknown, left.num_rounds_unknown) == (0, 2)
    with NativePool.open(rescored / "pool", writable=True) as pool:
        pool.rescore("reward", lambda _, texts: [float(len(text)) for text in texts])
        assert explain(rescored, 3).rounds == whole.rounds
        pool.retain(max_rounds=2)
        pool.compact()
        pool.gc(keep_snapshots=1)
        newest = len(pool) - 1
    for sample_id, unknown in ((newest, 1), (30, 2)):
        explanation = explain(rescored, sample_id)
        assert (explanation.rounds, explanation.num_rounds_unknown) == ((), unknown)
    shown = quark("pool", "explain", rescored, "30")
    assert "not known of 2 of the rounds" in shown.out
    assert "nothing yet" not in shown.out
    assert quark("pool", "explain", rescored, "30", "--json").json["rounds_unknown"] == 2


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.toml", "[run"),
        ("config.toml", "[run]\nsed = 3\n"),
        ("config.toml", None),
        ("run.json", "{"),
        ("run.json", "[]"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(tmp_path: Path, file: str, content: str | None) -> None:
    run = RunDirectory(tmp_path)
    run.identity.write_text('{"run_id": "a"}')
    run.config.write_text("")
    with NativePool.create(run.pool, vocab_size=1000) as pool:
        pool.append(make_batch("a", {"reward": [1.0]}))
    assert explain(tmp_path, 0).rounds == ()
    path = tmp_path / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(RunDirectoryError, match=str(path)):
        explain(tmp_path, 0)


def test_a_log_that_was_cut_short_counts_its_whole_rows(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert num_steps_logged(log) == 0
    log.write_text(
        '{"event": "run", "step": 0}\n{"event": "step", "step": 0}\n{"event": "step", "step": 1}\n'
        '{"event": "round", "step": 9}\n[]\n{"event": "step", "st'
    )
    assert num_steps_logged(log) == 2
