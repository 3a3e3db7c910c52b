"""``quark pool explain`` and ``quark pool create``."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from quark.cli.console import to_json
from quark.pool.base import PromptRecord
from quark.pool.defaults import MAX_QUANTILES
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.training.explain import explain
from tests.cli.commands import quark, quark_process
from tests.hostile_text import HOSTILE
from tests.pool.batches import make_batch


def test_explain_prints_what_the_library_says(run_dir: Path) -> None:
    shown = quark_process("pool", "explain", run_dir, "17", "--json")
    assert shown.code == 0, shown.err
    known = explain(run_dir, 17)
    assert shown.json["prompt"] == known.sample.prompt_text
    assert shown.json["completion_tokens"] == known.sample.completion_tokens.tolist()
    assert shown.json["rounds"] == to_json([dataclasses.asdict(use) for use in known.rounds])
    assert len(shown.json["rounds"]) == 2
    (reward,) = (s for s in known.standings if s.column == "reward")
    assert shown.json["scores"]["reward"]["rank"] == reward.rank
    assert shown.json["origin"]["key"] == known.key
    assert shown.json["origin"]["settings"]["sampling"]["max_new_tokens"] == 6
    assert shown.json["snapshot"]["num_samples"] == 60
    people = quark("pool", "explain", run_dir, "17").out
    assert str(known.key) in people
    assert "What was learnt from it" in people


def test_explain_of_a_pool_alone_says_what_it_cannot_know(run_dir: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(run_dir / "pool", tmp_path / "pool")
    shown = quark("pool", "explain", alone, "17", "-k", "3", "--json").json
    assert (shown["run"], shown["rounds"], shown["num_quantiles"]) == (None, [], 3)
    assert "not in a run directory" in quark("pool", "explain", alone, "17").out


@pytest.mark.parametrize(
    ("sample", "damage", "code", "says"),
    [
        ("60", None, 2, "no sample 60; it holds 60 samples"),
        ("-3", None, 2, "-3"),
        ("0", "[run", 4, "config.toml"),
    ],
)
def test_explain_names_what_is_wrong(
    run_dir: Path, tmp_path: Path, sample: str, damage: str | None, code: int, says: str
) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    if damage is not None:
        (copy / "config.toml").write_text(damage)
    outcome = quark("pool", "explain", copy, sample)
    assert outcome.code == code
    assert says in outcome.err
    assert "Traceback" not in outcome.err


def test_explained_text_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    texts = [text for text in HOSTILE[::5] if "\ud800" not in text]
    batch = make_batch("key", {"reward": [1.0] * len(texts)})
    prompts = [PromptRecord(token_ids=batch.prompts[0].token_ids, text=text) for text in texts[:3]]
    settings = '{"name": "\u202e\x9b2J"}'
    with NativePool.create(tmp_path / "pool", vocab_size=1000) as pool:
        pool.append(
            dataclasses.replace(batch, prompts=prompts, completion_texts=texts, settings=settings)
        )
    for sample, text in enumerate(texts):
        outcome = quark("pool", "explain", tmp_path / "pool", str(sample))
        assert outcome.code == 0, outcome.err
        assert all(c.isprintable() or c == "\n" for c in outcome.out)
        plain = quark("pool", "explain", tmp_path / "pool", str(sample), "--json")
        assert plain.out.isascii()
        assert plain.json["completion"] == text


def test_create_makes_a_pool_that_takes_samples(tmp_path: Path) -> None:
    made = quark_process(
        "pool", "create", tmp_path / "pool", "--vocab-size", "1000", "--no-text", "--json"
    )
    assert made.code == 0, made.err
    assert (made.json["vocab_size"], made.json["store_text"]) == (1000, False)
    with NativePool.open(tmp_path / "pool", writable=True) as pool:
        assert pool.info().uuid == made.json["uuid"]
        assert len(pool.append(make_batch("a", {"reward": [1.0]}, with_texts=False))) == 1
    assert "made" in quark("pool", "create", tmp_path / "other", "--vocab-size", "9").out


def test_create_takes_the_size_of_a_tokenizer(tmp_path: Path) -> None:
    made = quark("pool", "create", tmp_path / "pool", "--tokenizer", "embedded:reviews", "--json")
    assert made.code == 0, made.err
    assert made.json["vocab_size"] == 2048
    assert made.json["metadata"] == {"tokenizer": "embedded:reviews"}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["new"], 2, "--vocab-size"),
        (["new", "--vocab-size", "9", "--tokenizer", "embedded:reviews"], 2, "either"),
        (["new", "--vocab-size", "0"], 2, "vocab-size"),
        (["new", "--tokenizer", "/no/such/model"], 3, "/no/such/model"),
        (["no/parent", "--vocab-size", "9"], 3, "there is no directory no"),
        (["full", "--vocab-size", "9"], 2, "exists"),
    ],
)
def test_create_refuses_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    outcome = quark("pool", "create", *arguments)
    assert outcome.code == code, outcome.err
    assert says in outcome.err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["full", "mine.txt"]


def test_a_pool_by_another_name_is_still_the_pool_of_its_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.checkpoints.joinpath("step-00000001").mkdir(parents=True)
    run.identity.write_text('{"run_id": "a"}')
    state = run.checkpoints / "step-00000001" / "state.json"
    state.write_text('{"pool": {"generation": 1}}')
    with NativePool.create(run.pool, vocab_size=1000) as pool:
        for number in range(3):
            pool.append(make_batch(f"a{number}", {"reward": [1.0]}))
    link = tmp_path / "link"
    link.symlink_to(run.pool)
    elsewhere = tmp_path / "elsewhere"
    for name in (run.path, run.pool, link, run.path / ".." / "link"):
        assert quark("pool", "gc", name).code == 2
    run.pool.rename(elsewhere)
    run.pool.symlink_to(elsewhere)
    for name in (run.path, run.pool):
        tried = quark("pool", "gc", name, "--dry-run")
        assert (tried.code, "is a link out of" in tried.err) == (4, True)
    assert quark("pool", "gc", elsewhere).code == 0, "nothing there tells of the run"


def test_rescore_says_what_is_in_the_way_before_it_scores(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    assert quark("pool", "create", pool, "--vocab-size", "1000").code == 0
    assert "no samples" in quark("pool", "rescore", pool, "length").err
    with NativePool.open(pool, writable=True) as writer:
        writer.append(make_batch("a", {"reward": [1.0] * 3}))
        for first in range(3):
            writer.draft_scores("reward", first, np.ones(1, np.float32), source='{"name": "other"}')
    with NativePool.create(tmp_path / "silent", vocab_size=1000, store_text=False) as silent:
        silent.append(make_batch("a", {"reward": [1.0]}, with_texts=False))
    for arguments, says in (
        ((pool, "length"), "--restart"),
        ((pool, "length", "--as", "Bad Name"), "a-z 0-9"),
        ((tmp_path / "silent", "length"), "no text"),
    ):
        refused = quark("pool", "rescore", *arguments)
        assert refused.code == 2
        assert says in " ".join(refused.err.split())
        assert "of 3 samples" not in refused.err
        assert "Traceback" not in refused.err
    assert quark("pool", "rescore", pool, "length", "--restart").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["head", "pool", "-k", "40000"], 2, "32767"),
        (["stats", "pool", "-k", "40000"], 2, "32767"),
        (["gc", "pool", "--keep", "9" * 20], 2, "--keep"),
        (["retain", "pool", "--max-samples", "1" + "0" * 23], 2, "--max-samples"),
        (["retain", "pool", "--max-rounds", "1" + "0" * 23], 2, "--max-rounds"),
        (["create", "x" * 300, "--vocab-size", "9"], 4, "name too long"),
        (["fork", "pool", "x" * 300], 4, "name too long"),
        (["info", "nope"], 3, "there is no pool at nope"),
        (["verify", "nope"], 3, "there is no pool at nope"),
        (["query", "file", "SELECT 1"], 3, "file is a file; a pool is a directory"),
        (["stats", "folder"], 3, "folder is a directory, but not a pool"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_named_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with NativePool.create(tmp_path / "pool", vocab_size=1000) as pool:
        pool.append(make_batch("a", {"reward": [1.0]}))
    refused = quark("pool", *arguments)
    assert refused.code == code
    assert says in " ".join(refused.err.replace("│", "").split())
    assert "Traceback" not in refused.err


def test_the_largest_bounds_are_taken(tmp_path: Path) -> None:
    with NativePool.create(tmp_path / "pool", vocab_size=1000) as pool:
        pool.append(make_batch("a", {"reward": [1.0]}))
    assert quark("pool", "head", tmp_path / "pool", "-k", str(MAX_QUANTILES)).code == 0
    assert quark("pool", "head", tmp_path / "pool", "-k", str(MAX_QUANTILES + 1)).code == 2
    assert quark("pool", "gc", tmp_path / "pool", "--keep", str(2**63 - 1)).code == 0
    for option in ("--max-samples", "--max-rounds"):
        assert quark("pool", "retain", tmp_path / "pool", option, str(2**64 - 1)).code == 0


def test_a_damaged_pool_is_forked_and_the_fork_is_as_large(tmp_path: Path) -> None:
    with NativePool.create(tmp_path / "pool", vocab_size=1000) as pool:
        pool.append(make_batch("a", {"reward": [1.0] * 3}))
        num_bytes = pool.info().num_bytes
        assert quark("pool", "gc", tmp_path / "pool", "--dry-run").code == 4, "a writer is there"
    (segment,) = (tmp_path / "pool" / "segments").iterdir()
    segment.write_bytes(bytes(segment.stat().st_size))
    made = quark("pool", "fork", tmp_path / "pool", tmp_path / "fork", "--json")
    assert made.code == 0, made.err
    assert (made.json["bytes"], made.json["samples"]) == (num_bytes, 3)
    assert "damaged" in quark("pool", "verify", tmp_path / "fork").out


@pytest.mark.parametrize("columns", [[], ["judge"]], ids=["none", "another"])
def test_a_pool_without_a_reward_is_shown(tmp_path: Path, columns: list[str]) -> None:
    path = tmp_path / "pool"
    with NativePool.create(path, vocab_size=1000) as pool:
        batch = make_batch("a", {"judge": [1.0, 2.0]})
        pool.append(
            dataclasses.replace(batch, scores={name: batch.scores[name] for name in columns})
        )
    head = quark("pool", "head", path, "--json")
    assert head.code == 0, head.err
    assert [(sample["id"], sample["quantile"]) for sample in head.json["samples"]] == [
        (0, -1),
        (1, -1),
    ]
    assert quark("pool", "head", path).code == 0
    stats = quark("pool", "stats", path, "--json")
    assert stats.code == 0, stats.err
    assert (stats.json["samples"], stats.json["score"]) == (2, None)
    assert list(stats.json["columns"]) == columns
    assert stats.json["rounds"][0]["samples"] == 2
    assert "no score reward" in quark("pool", "stats", path).out
    for arguments in (["head", "--best"], ["head", "-q", "0"], ["stats", "--score", "nope"]):
        refused = quark("pool", arguments[0], path, *arguments[1:])
        assert (refused.code, "no score column" in refused.err) == (2, True)


def test_infinite_scores_are_counted_without_a_warning(tmp_path: Path) -> None:
    infinity = float("inf")
    with NativePool.create(tmp_path / "pool", vocab_size=1000) as pool:
        pool.append(make_batch("a", {"reward": [infinity, -infinity, float("nan"), 1.0]}))
    stats = quark("pool", "stats", tmp_path / "pool", "--json").json
    reward = stats["columns"]["reward"]
    assert (reward["infinite"], reward["nan"], reward["median"]) == (2, 1, 1.0)
    assert [reward[name] for name in ("mean", "std", "min", "max")] == [None] * 4
    assert stats["rounds"][0]["mean"] is None
    assert "inf" in quark("pool", "stats", tmp_path / "pool").out


def test_head_and_stats_rank_the_pool_of_a_run_as_the_run_does(
    run_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir / "pool", run / "pool")
    shutil.copy(run_dir / "run.json", run)
    config = (run_dir / "config.toml").read_text(encoding="utf-8")
    config = config.replace("num_quantiles = 5", "num_quantiles = 3\nlast_rounds = 1")
    (run / "config.toml").write_text(config, encoding="utf-8")
    for path in (run, run / "pool"):
        shown = quark("pool", "head", path, "-n", "60", "--json").json["samples"]
        ranked = [sample["quantile"] for sample in shown]
        assert ranked == [-1] * 40 + ranked[40:]  # the first round is out of it
        assert sorted(ranked[40:].count(quantile) for quantile in range(3)) == [6, 7, 7]
        explained = quark("pool", "explain", path, "50", "--json").json
        assert ranked[50] == explained["scores"]["reward"]["quantile"]
        assert sum(quark("pool", "stats", path, "--json").json["quantile_counts"]) == 20
    assert "--quantile 3 is not in 0 .. 2" in quark("pool", "head", run, "--quantile", "3").err
    four = quark("pool", "stats", run, "-k", "4", "--json").json
    assert len(four["quantile_counts"]) == 4
    config = config.replace('ties = "hash"', 'ties = "by chance"')
    (run / "config.toml").write_text(config, encoding="utf-8")
    refused = quark("pool", "head", run)
    assert (refused.code, "config.toml does not say" in refused.err) == (2, True)


def test_a_place_that_has_no_folder_is_named(run_dir: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "no" / "folder"
    for command in (
        ("pool", "create", nowhere, "--vocab-size", "9"),
        ("pool", "fork", run_dir, nowhere),
        ("init", nowhere),
        ("report", run_dir, "--output", nowhere),
    ):
        refused = quark(*command)
        assert (refused.code, refused.err) == (
            3,
            f"error: there is no directory {nowhere.parent}\n",
        )


def test_a_query_of_another_table_is_told_the_name(run_dir: Path) -> None:
    assert (
        "the table is called pool" in quark("pool", "query", run_dir, "SELECT 1 FROM samples").err
    )
