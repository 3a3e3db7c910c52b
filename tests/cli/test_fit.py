"""``quark fit`` from end to end: on a run's pool, on a pool alone, and on what it cannot use."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.selftest.samples import make_batch
from tests.cli.commands import quark
from tests.tiny import save_tiny

FEW = ("--steps", "3", "--every", "2", "--held-out", "0.3", "--set", "optimizer.batch_size=8")


@pytest.fixture
def pool(run_dir: Path, tmp_path: Path) -> Path:
    """The samples of a run, without the run."""
    with NativePool.open(RunDirectory(run_dir).pool) as original:
        original.fork(tmp_path / "pool").close()
    return tmp_path / "pool"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_runs_pool_is_learned_from_and_stays_as_it_is(run_dir: Path) -> None:
    before = files_of(run_dir)
    outcome = quark("fit", run_dir, *FEW, "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert files_of(run_dir) == before
    assert found["num_quantiles"] == 5
    assert found["chance"] == pytest.approx(math.log(5))
    assert found["train_samples"] + found["held_out_samples"] == 60
    assert [point["step"] for point in found["points"]] == [0, 2, 3]
    for point in found["points"]:
        held_out, interval = point["held_out"], point["interval"]
        assert held_out["information"] == pytest.approx(found["chance"] - held_out["contrast_loss"])
        assert interval["low"] <= held_out["information"] <= interval["high"]
        assert interval["mean"] == pytest.approx(held_out["information"])
        assert point["drift"] > 0
    assert found["points"][0]["train_information"] is None
    assert found["points"][1]["train_information"] is not None
    assert found["verdict"]
    assert found["best_step"] in (0, 2, 3)


def test_the_same_command_says_the_same(run_dir: Path) -> None:
    command = ("fit", run_dir, *FEW, "--set", "run.num_threads=1", "--json")
    assert quark(*command).json == quark(*command).json


def test_people_get_a_table_and_a_verdict(run_dir: Path) -> None:
    outcome = quark("fit", run_dir, *FEW, "--set", "optimizer.learning_rate=3e-4")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert "learning rate 0.0003)" in outcome.out.splitlines()[0]
    lines = outcome.out.splitlines()
    assert lines[0].startswith("learning reward in 5 quantiles from ")
    assert [line.split()[0] for line in lines[2:6]] == ["step", "0", "2", "3"]
    assert lines[-1].rstrip().endswith((".", "steps"))


def test_a_pool_alone_needs_a_model_and_gives_one_that_answers(pool: Path, tmp_path: Path) -> None:
    refused = quark("fit", pool, *FEW)
    assert refused.code == 2
    assert "--model" in refused.err
    out = tmp_path / "fitted"
    outcome = quark(
        "fit", pool, "--model", "embedded:reviews", *FEW, "--set", "pool.num_quantiles=2",
        "--score", "vader", "--out", out, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert outcome.json["out"] == str(out)
    assert outcome.json["chance"] == pytest.approx(math.log(2))
    assert 1e-4 < outcome.json["learning_rate"] < 1e-3, "suited to the size of the model"
    answered = quark("generate", out, "-p", "The film", "--quantile", "1", "--json")
    assert answered.code == 0, answered.err
    assert answered.json["completions"][0]["text"]
    again = quark("fit", pool, "--model", "embedded:reviews", *FEW, "--out", out)
    assert again.code == 2
    assert "is there already" in again.err


def test_an_objective_of_ones_own_is_learned_by(pool: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text('[model]\nname = "embedded:reviews"\n[objective]\nadvantage_coef = 0.5\n')
    outcome = quark("fit", pool, "--config", config, *FEW, "--score", "vader", "--json")
    assert outcome.code == 0, outcome.err
    # The likelihood and the advantage compare no tokens while they learn.
    assert {point["train_information"] for point in outcome.json["points"]} == {None}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--score", "nonsense"), 2, "no such column; it has reward, vader"),
        (("--set", "pool.where='reward > 99'"), 3, "0 ranked samples"),
        (("--set", "pool.num_quantiles=1"), 2, "compares reward tokens"),
        (("--set", "nonsense=1"), 2, "nonsense"),
        (("--held-out", "0.5"), 2, "--held-out"),
    ],
)
def test_what_cannot_be_is_said(
    run_dir: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    outcome = quark("fit", run_dir, *arguments)
    assert outcome.code == code, outcome.err
    assert said in outcome.err


def test_a_model_of_another_vocabulary_is_refused(pool: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    outcome = quark("fit", pool, "--model", model, *FEW)
    assert outcome.code == 3
    assert "of a vocabulary of" in outcome.err
    assert "embedded:reviews" in outcome.err


def test_a_model_of_the_same_size_and_other_words_is_refused(pool: Path, tmp_path: Path) -> None:
    """Its ids mean other pieces of text, which the stored completions show."""
    from quark.assets import asset_path

    model = tmp_path / "shuffled"
    model.mkdir()
    for file in asset_path("models", "reviews").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    plain = [word for word in vocabulary if word not in special]
    ids = [vocabulary[word] for word in plain]
    for word, number in zip(plain, reversed(ids), strict=True):
        vocabulary[word] = number
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = quark("fit", pool, "--model", model, *FEW)
    assert outcome.code == 3, outcome.err
    assert "completions as another text than the one that is stored beside them" in outcome.err
    assert "Give --model the model that wrote them" in " ".join(outcome.err.split())


def test_a_model_that_fails_its_check_is_refused(pool: Path, tmp_path: Path) -> None:
    from quark.assets import asset_path

    model = shutil.copytree(asset_path("models", "reviews"), tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    outcome = quark("fit", pool, "--model", model, *FEW, "--out", tmp_path / "fitted")
    assert outcome.code == 3, outcome.err
    assert "fails the check 'steering'" in " ".join(outcome.err.split())
    assert not (tmp_path / "fitted").exists()


def test_samples_without_a_token_are_an_error_that_names_the_pool(
    run_dir: Path, tmp_path: Path
) -> None:
    with NativePool.open(RunDirectory(run_dir).pool) as original:
        vocab_size = original.settings.vocab_size
    path = tmp_path / "strange"
    with NativePool.create(path, vocab_size=vocab_size, store_text=False) as strange:
        for number in range(20):
            scores = {"reward": [float(i) for i in range(9)]}
            strange.append(make_batch(str(number), scores, content=number, with_texts=False))
    outcome = quark("fit", path, "--model", "embedded:reviews", *FEW)
    assert outcome.code == 3, outcome.err
    assert str(path) in outcome.err
    assert "needs a prompt and a completion token" in outcome.err


def test_a_pool_that_is_not_there_is_named(tmp_path: Path) -> None:
    outcome = quark("fit", tmp_path / "nowhere", "--model", "embedded:reviews")
    assert outcome.code == 3
    assert "nowhere" in outcome.err


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_learned(
    run_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    outcome = quark("fit", run_dir, *FEW, "--out", tmp_path / "file" / "fitted")
    assert outcome.code == 2
    assert "--out" in outcome.err
    assert outcome.out == ""
