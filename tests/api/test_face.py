"""What `import quark` offers: its names, a whole training on objects, and what a resumed run holds on to."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import quark
from quark.api.arguments import settings_table
from quark.api.progress import NotebookListener, PlainListener
from quark.config.load import load_config
from quark.errors import ConfigError, DataError, ModelError, RewardError
from quark.training.events import Progress, RoundSummary
from tests.api.small import PROMPTS, SMALL
from tests.tiny import byte_tokenizer, tiny_gpt2

ROOT = Path(quark.__file__).parent.parent


def length(*, prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def train(run_dir: Path, **given: Any) -> quark.Run:
    defaults: dict[str, Any] = {
        "model": (tiny_gpt2(), byte_tokenizer()),
        "prompts": PROMPTS,
        "reward": length,
    }
    return quark.train(None, run_dir=run_dir, quiet=True, **{**defaults, **SMALL, **given})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> quark.Run:
    return train(tmp_path_factory.mktemp("runs") / "small")


def test_the_package_names_what_its_stub_names() -> None:
    stub = ast.parse((ROOT / "quark" / "__init__.pyi").read_text(encoding="utf-8"))
    named = {
        alias.asname: f"{node.module}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert named == quark._PLACES
    for name in named:
        assert getattr(quark, name).__doc__, name
    with pytest.raises(AttributeError, match=r"no attribute 'Pol'"):
        quark.Pol  # noqa: B018


def test_importing_quark_is_quick_and_a_pool_needs_no_torch() -> None:
    code = (
        "import sys, time; start = time.process_time(); import quark; took = time.process_time() - start;"
        "quark.Pool; print(took < 0.3, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


def test_a_run_on_objects_is_a_run_like_any_other(run: quark.Run) -> None:
    assert run.result is not None
    assert not run.result.interrupted
    assert run.result.report is not None
    assert run.result.report.is_file()
    assert len(run.pool) == 16
    rounds = run.metrics.filter(pl.col("event") == "round")
    assert rounds["round"].to_list() == [0, 1]
    assert rounds["reward_mean"].is_not_null().all()
    said = (run.path / "config.toml").read_text()
    assert 'name = "run:given/model-' in said
    assert 'source = "run:given/prompts-' in said
    assert run.config.reward.name == "python:length"
    assert Path(run.config.model.name).is_dir()
    assert (run.path / "model" / "model.safetensors").is_file()


def test_a_run_generates_and_measures(run: quark.Run) -> None:
    completions = run.generate("say one", num=2, max_new_tokens=3)
    assert [completion.prompt.text for completion in completions] == ["say one"] * 2
    assert all(len(completion.token_ids) <= 3 for completion in completions)
    figures = run.evaluate(["say one", "say two"], quantiles=["none", "best"])
    assert figures["quantile"].to_list() == [None, 1]
    lengths = [figures["reward_mean"][i] for i in range(2)]
    assert all(0 <= value <= 4 for value in lengths)
    other = run.evaluate(
        pl.DataFrame({"prompt": ["say one"]}),
        quantiles=["best"],
        reward=lambda *, prompts, completions: [7.0] * len(completions),
    )
    assert other["reward_mean"].to_list() == [7.0]
    points = run.frontier([0.0, 1.0], most_drift=1e6)
    assert points["quantile"].to_list() == [None, 0, 1, 1]
    assert points["is_picked"].sum() == 1
    assert (points["reward_low"] <= points["reward"]).all()
    assert run.report().read_text().startswith("<!doctype html>")


def test_a_saved_model_is_loaded_without_its_run(run: quark.Run) -> None:
    model = quark.load(run.path / "model")
    assert model.num_quantiles == 2
    [completion] = model.generate("say one", quantile=0, seed=3, max_new_tokens=2)
    assert completion.reward_quantile == 0
    with pytest.raises(DataError, match=r"empty prompt"):
        model.generate("")


def test_a_run_resumes_with_its_reward_after_it_was_moved(run: quark.Run, tmp_path: Path) -> None:
    moved = shutil.copytree(run.path, tmp_path / "moved")
    with pytest.raises(RewardError, match=r"passed in Python.*pass it again"):
        quark.Run(moved).resume(quiet=True)
    again = quark.Run(moved).resume(reward=length, num_rounds=3, quiet=True)
    assert again.result is not None
    assert again.result.rounds == 3
    assert again.config.model.name == str(moved / "given" / Path(run.config.model.name).name)
    known = load_config(run.path / "config.toml").origins
    assert known  # the file is valid for commands, too


def test_another_reward_is_refused_with_the_way_out(run: quark.Run) -> None:
    def reversed_length(*, prompts: list[str], completions: list[str]) -> list[float]:
        return [-float(len(text)) for text in completions]

    with pytest.raises(ConfigError, match=r"(?s)reward.name.*quark.Pool.open.*rescore"):
        train(run.path, reward=reversed_length)
    reversed_length.__name__ = "length"
    with pytest.raises(ConfigError, match=r"changed, and two scales"):
        train(run.path, reward=reversed_length)


def test_other_prompts_and_another_model_are_refused(run: quark.Run) -> None:
    with pytest.raises(ConfigError, match=r"prompts.source"):
        train(run.path, prompts=[*PROMPTS, "say nine"])
    with pytest.raises(ConfigError, match=r"model.name"):
        train(run.path, model=(tiny_gpt2(seed=1), byte_tokenizer()))


def test_a_fresh_run_leaves_nothing_of_the_one_before(run: quark.Run, tmp_path: Path) -> None:
    folder = shutil.copytree(run.path, tmp_path / "again")
    fresh = train(folder, prompts=PROMPTS[:6], num_rounds=1, fresh=True, force=True)
    kept = {path.name for path in (folder / "given").iterdir()}
    assert kept == {Path(fresh.config.prompts.source).name, Path(fresh.config.model.name).name}
    assert len(fresh.pool) == 8


def test_a_run_goes_on_with_the_reward_that_its_samples_were_scored_by_anew(
    run: quark.Run, tmp_path: Path
) -> None:
    folder = shutil.copytree(run.path, tmp_path / "rescored")

    def short(*, prompts: list[str], completions: list[str]) -> list[float]:
        return [-float(len(text)) for text in completions]

    with quark.Pool.open(folder, writable=True) as pool:
        assert pool.rescore(short).num_samples == 16
        assert pool.scores().max() <= 0
    again = quark.Run(folder).resume(reward=short, num_rounds=3, quiet=True)
    assert again.pool.scores().max() <= 0
    assert again.config.reward.name == "python:short"


def test_settings_are_found_by_their_key() -> None:
    assert settings_table({"num_rounds": 3, "optimizer": {"batch_size": 8}, "run.seed": 1}) == {
        "run": {"num_rounds": 3, "seed": 1},
        "optimizer": {"batch_size": 8},
    }
    with pytest.raises(ConfigError, match=r"batch_size is a setting of .*optimizer=\{'batch_size'"):
        settings_table({"batch_size": 8})
    with pytest.raises(ConfigError, match=r"unknown key num_round .*did you mean run.num_rounds"):
        quark.train("demo", num_round=1)


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model=\(model, tokenizer\)"):
        train(tmp_path / "run", model=tiny_gpt2())
    with pytest.raises(ModelError, match=r"is int, not a PreTrainedModel"):
        train(tmp_path / "run", model=3)
    assert not (tmp_path / "run").exists()


SUMMARY = RoundSummary(
    round=0, num_rounds=2, metrics={"reward_mean": 0.5}, best_samples=(), worst_samples=()
)


def test_a_notebook_shows_one_box_in_which_hostile_text_does_nothing() -> None:
    boxes: list[str] = []
    listener = NotebookListener(boxes.append)
    listener.on_message("<script>alert(1)</script>", level="warning")
    listener.on_message("loading")
    listener.on_progress(Progress(phase="learning", round=1, done=3, total=9))
    listener.on_round(SUMMARY)
    assert "<script>" not in boxes[-1]
    assert "&lt;script&gt;" in boxes[-1]
    assert '<progress value="3" max="9">' in boxes[-1]
    assert "<td>0</td><td>0.500</td>" in boxes[-1]


def test_a_script_gets_plain_lines() -> None:
    lines: list[str] = []
    listener = PlainListener(lines.append)
    listener.on_message("\x1b[31mred", level="warning")
    listener.on_round(SUMMARY)
    assert lines == ["warning: \\x1b[31mred", "round 0 of 2, reward 0.500"]
