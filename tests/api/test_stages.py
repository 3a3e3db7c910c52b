"""Any stage of a run is usable: its checkpoints, a run that was stopped, and a folder of runs."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import quark
from quark.cli.completing import presets, setting_keys
from quark.config.load import known_keys, load_config, preset_names
from quark.errors import CheckpointError, ConfigError, RunDirectoryError
from tests.cli.commands import quark as command


def test_the_model_of_a_stopped_run_is_its_last_checkpoint(stopped: quark.Run) -> None:
    assert stopped.result is not None
    assert stopped.result.interrupted
    assert not (stopped.path / "model").exists()
    outcome = command("generate", stopped.path, "-p", "say one", "--max-new-tokens", "3", "--json")
    assert outcome.code == 0, outcome.err
    assert "weights of the checkpoint of step" in outcome.err
    assert len(outcome.json["completions"]) == 1
    assert stopped.evaluate(["say one"], quantiles=["best"])["quantile"].to_list() == [1]
    assert "stopped" in command("runs", stopped.path.parent).out


def test_checkpoints_are_named(finished: quark.Run) -> None:
    steps = sorted(int(path.name[5:]) for path in (finished.path / "checkpoints").iterdir())
    assert finished.at("last").checkpoint_step == steps[-1]
    assert finished.at(steps[0]).checkpoint_step == steps[0]
    assert finished.at("best").checkpoint_step in steps
    with pytest.raises(CheckpointError, match=r"no checkpoint 7777; there are the steps \d"):
        finished.at(7777)
    with pytest.raises(CheckpointError, match="no checkpoint newest; there are"):
        finished.at("newest")
    refused = command("generate", finished.path / "model", "-p", "a", "--checkpoint", "best")
    assert refused.code == 2
    assert "is not a run directory" in refused.err


def test_the_last_checkpoint_computes_what_the_finished_model_does(finished: quark.Run) -> None:
    texts = [
        command("generate", finished.path, "-p", "say one", "-n", "2", *option, "--json").json
        for option in ((), ("--checkpoint", "last"))
    ]
    assert texts[0]["completions"] == texts[1]["completions"]


def test_a_checkpoint_is_exported_for_plain_transformers(
    finished: quark.Run, tmp_path: Path
) -> None:
    out = tmp_path / "exported"
    outcome = command("model", "export", finished.path, out, "--checkpoint", "last", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["checkpoint_step"] == finished.at("last").checkpoint_step
    ids = AutoTokenizer.from_pretrained(out)("say one", return_tensors="pt").input_ids
    assert AutoModelForCausalLM.from_pretrained(out)(ids).logits.shape[1] == ids.shape[1]
    assert "optimizer step" in (out / "README.md").read_text()
    assert command("model", "export", finished.path, out).code == 2


def test_a_run_without_a_checkpoint_says_how_it_goes_on(
    finished: quark.Run, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished.path, tmp_path / "begun")
    for name in ("model", "checkpoints"):
        shutil.rmtree(folder / name)
    with pytest.raises(
        RunDirectoryError, match=r"no checkpoint yet: `quark train .*begun` resumes"
    ):
        quark.load(folder)


def test_a_strangers_checkpoint_needs_leave_to_load_the_original_model(
    finished: quark.Run, tmp_path: Path
) -> None:
    moved = shutil.copytree(finished.path, tmp_path / "strange")  # grants are of one place
    with pytest.raises(ConfigError, match="--allow"):
        quark.Run(moved).at("last")
    assert quark.Run(moved).at("last", allow=[finished.config.model.name]).num_quantiles == 2


def test_runs_are_listed_with_what_is_known(finished: quark.Run, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "a" / "good")
    broken = shutil.copytree(finished.path, tmp_path / "broken")
    (broken / "run.json").write_text("{")
    listed = command("runs", tmp_path, "--json").json["runs"]
    assert [(Path(run["path"]).name, run["state"]) for run in listed] == [
        ("good", "finished"),
        ("broken", "damaged"),
    ]
    good = listed[0]
    assert (good["rounds"], good["num_rounds"], good["samples"]) == (2, 2, 16)
    assert good["reward"] == "length"
    assert 0 <= good["reward_now"] <= 1
    assert good["drift"] >= 0
    assert "run.json is damaged" in command("runs", tmp_path).out
    assert command("runs", tmp_path / "none").code == 3


def test_completions_go_to_a_file_and_prompts_come_from_stdin(
    finished: quark.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("say one\n\nsay two\n"))
    out = tmp_path / "completions.jsonl"
    arguments = ("generate", finished.path, "--prompts", "-", "--out", out, "--max-new-tokens", "2")
    assert command(*arguments).code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["say one", "say two"]
    assert command(*arguments).code == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "stdin has no prompts" in command(*arguments, "--force").err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_asked_for_prompts(
    finished: quark.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("say one\n\nsay two"))
    outcome = command("generate", finished.path, "--max-new-tokens", "2")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("say one")
    assert "\nsay two" in outcome.out
    assert outcome.err.count("prompt> ") == 4


def test_the_worst_samples_and_an_older_state_are_shown(finished: quark.Run) -> None:
    shown = [
        command("pool", "head", finished.path, option, "-n", "16", "--json").json["samples"]
        for option in ("--best", "--worst")
    ]
    scores = [[sample["scores"]["reward"] for sample in samples] for samples in shown]
    assert scores[0] == scores[1][::-1] == sorted(scores[0], reverse=True)
    first = command("pool", "head", finished.path, "--snapshot", "1", "-n", "99", "--json")
    assert len(first.json["samples"]) == 8
    missing = command("pool", "head", finished.path, "--snapshot", "99")
    assert (missing.code, "--snapshot 99" in missing.err) == (2, True)
    assert command("pool", "head", finished.path, "--best", "--worst").code == 2


def test_only_what_differs_from_the_defaults_is_shown() -> None:
    shown = command("config", "show", "demo", "--set", "run.seed=0", "--changed")
    assert "learning_rate" in shown.out
    assert "run.seed" not in shown.out
    said = command("config", "show", "demo", "--changed", "--json").json
    assert said["config"]["run"]["num_rounds"] == 14
    assert "seed" not in said["config"]["run"]


def test_presets_and_keys_are_completed() -> None:
    assert presets("demo") == ["demo", "demo-paper"]
    assert setting_keys("optimizer.learning") == ["optimizer.learning_rate="]
    assert setting_keys("pool.ties=h") == ["pool.ties=hash"]
    assert set(presets("")) == set(preset_names())
    assert len(setting_keys("")) > 100
    assert {key[:-1] for key in setting_keys("")} <= set(known_keys())


def test_a_new_configuration_is_short_and_has_nothing_of_the_demo(tmp_path: Path) -> None:
    file = tmp_path / "quark.toml"
    assert command("init", file).code == 0
    text = file.read_text()
    assert len(text.splitlines()) < 60
    config, demo, default = (load_config(name).config for name in (file, "demo", None))
    assert config == load_config("own").config
    assert config.objective == default.objective
    assert config.optimizer.learning_rate < demo.optimizer.learning_rate / 10
    for section in ("model", "prompts", "reward"):
        assert "embedded" not in getattr(config, section).model_dump_json()
    assert command("init", tmp_path / "full.toml", "--full", "--preset", "demo").code == 0
    assert load_config(tmp_path / "full.toml").config == demo
