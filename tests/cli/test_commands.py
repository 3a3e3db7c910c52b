"""Every command on one tiny run of the embedded model."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quark.pool.native import NativePool
from quark.rewards.build import build_reward
from quark.rewards.config import RewardConfig
from quark.run_directory import RunDirectory
from tests.cli.commands import ROOT, TINY_RUN, Outcome, quark, quark_process, trained_run
from tests.hostile_text import HOSTILE


def test_train_prints_one_json_object_with_the_documented_fields(trained: Outcome) -> None:
    result = trained.json
    assert set(result) >= {
        "run_dir",
        "pool",
        "model",
        "report",
        "rounds",
        "samples",
        "reward_before",
        "reward_after",
        "kl_policy_to_reference",
        "kl_reference_to_policy",
        "control_curve",
        "seconds",
        "interrupted",
        "metrics",
        "before_after",
    }
    assert result["rounds"] == 2
    assert result["samples"] == 60
    assert len(result["control_curve"]) == 5
    assert 0 < result["reward_before"] < 1
    assert result["interrupted"] is False
    for key in ("run_dir", "pool", "model", "report"):
        assert Path(result[key]).exists()


def test_the_documented_fields_are_there(run_dir: Path, tmp_path: Path) -> None:
    """Every row of the table in docs/cli.md that needs no more than a run."""
    table = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command, arguments in (
        ("train --dry-run", ["train", *TINY_RUN, "--dry-run"]),
        ("generate", ["generate", run_dir, "-p", "a"]),
        ("evaluate", ["evaluate", run_dir, "-q", "best"]),
        ("pool info", ["pool", "info", run_dir]),
        ("pool head", ["pool", "head", run_dir]),
        ("pool stats", ["pool", "stats", run_dir]),
        ("pool verify", ["pool", "verify", run_dir]),
        ("pool explain", ["pool", "explain", run_dir, "7"]),
        ("pool create", ["pool", "create", tmp_path / "pool", "--vocab-size", "9"]),
        ("config show", ["config", "show"]),
        ("reward check", ["reward", "check", "vader"]),
        ("doctor", ["doctor"]),
    ):
        row = next(line for line in table.splitlines() if line.startswith(f"| `{command}` | "))
        outside_brackets = re.sub(r"\([^)]*\)", "", row.split(" | ")[1])
        documented = re.findall(r"`(\w+)`", outside_brackets)
        assert documented
        assert set(documented) == set(quark(*arguments, "--json").json), command


def test_train_reports_rounds_on_stderr(trained: Outcome) -> None:
    assert "round 0/1 · reward" in trained.err
    assert "best (4)" in trained.err
    assert "\x1b" not in trained.err


def test_training_again_resumes_and_says_so(run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    outcome = quark("train", "--run-dir", copy, *TINY_RUN, "--json", "--resume")
    assert outcome.code == 0, outcome.err
    assert "resuming the run" in outcome.err
    assert outcome.json["samples"] == 60


def test_an_exact_resume_is_insisted_on(run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    resume = ["train", "--run-dir", copy, *TINY_RUN, "--require-exact"]
    assert quark(*resume).code == 0
    try:
        refused = quark(*resume, "--set", "run.num_threads=2")
    finally:
        torch.set_num_threads(1)
    assert refused.code == 4
    assert "threads 1 -> 2" in refused.err


def test_resume_without_a_run_is_refused(tmp_path: Path) -> None:
    outcome = quark("train", "--run-dir", tmp_path / "none", *TINY_RUN, "--resume")
    assert outcome.code == 4
    assert "leave out --resume" in outcome.err
    assert not (tmp_path / "none").exists()


def test_fresh_refuses_a_run_and_force_deletes_it(run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    before = RunDirectory(copy).identity.read_bytes()
    refused = quark("train", "--run-dir", copy, *TINY_RUN, "--fresh")
    assert refused.code == 4
    assert "--force" in refused.err
    assert RunDirectory(copy).identity.read_bytes() == before
    forced = quark("train", "--run-dir", copy, *TINY_RUN, "--fresh", "--force", "--json")
    assert forced.code == 0, forced.err
    assert RunDirectory(copy).identity.read_bytes() != before


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    outcome = quark("train", "--run-dir", tmp_path, *TINY_RUN, "--fresh", "--force")
    assert outcome.code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--set", "objective.kl_ceof=0.1"], 2, "objective.kl_coef"),
        (["--set", "run.num_rounds=-1"], 2, "run.num_rounds"),
        (["no-such-preset"], 2, "demo"),
        (["no/such/file.toml"], 2, "no/such/file.toml"),
        (["--set", "model.name=/no/such/model"], 3, "/no/such/model"),
        (["--set", "prompts.source=/no/such/prompts.jsonl"], 3, "/no/such/prompts.jsonl"),
        (["--set", "reward.name=no_such_module_x:reward"], 3, "no_such_module_x"),
    ],
)
def test_a_mistake_is_named_with_its_exit_code(
    arguments: list[str], code: int, says: str, tmp_path: Path
) -> None:
    outcome = quark("train", "--run-dir", tmp_path / "run", *arguments)
    assert outcome.code == code, outcome.err
    assert says in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


def test_a_dry_run_shows_everything_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = quark("train", *TINY_RUN, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    shown = outcome.json
    assert shown["config"]["run"]["num_rounds"] == 2
    assert shown["origins"]["run.num_rounds"] == "--set"
    assert shown["origins"]["reward.name"] == "preset demo"
    assert shown["origins"]["optimizer.eps"] == "default"
    assert len(shown["prompts"]) == 3
    for prompt in shown["prompts"]:
        assert prompt["text"].startswith("<|reward_4|>")
        assert 0 <= prompt["reward"] <= 1
    people = quark("train", *TINY_RUN, "--dry-run")
    assert "nothing was written" in people.out
    assert "<|reward_4|>" in people.out
    assert list(tmp_path.iterdir()) == []


def test_generate_obeys_quantile_number_and_seed(run_dir: Path) -> None:
    arguments = (
        "generate",
        run_dir,
        "-p",
        "the battery",
        "--prompt",
        "zoom",
        "--num",
        "2",
        "--json",
    )
    first = quark(*arguments, "--seed", "7").json
    assert first["quantile"] == 4
    assert [c["prompt"] for c in first["completions"]] == ["the battery"] * 2 + ["zoom"] * 2
    assert all(1 <= c["num_tokens"] <= 6 for c in first["completions"])
    assert quark(*arguments, "--seed", "7").json == first
    assert quark(*arguments, "--seed", "8").json["completions"] != first["completions"]
    assert quark(*arguments, "--quantile", "0").json["quantile"] == 0
    assert quark(*arguments, "--quantile", "none").json["quantile"] is None
    longer = quark(*arguments, "--max-new-tokens", "9", "--temperature", "0", "--top-p", "0.5").json
    assert (
        longer["sampling"] | {"max_new_tokens": 9, "temperature": 0.0, "top_p": 0.5}
        == longer["sampling"]
    )


@pytest.mark.parametrize("quantile", ["5", "-1", "worst", "٣", ""])
def test_generate_refuses_a_quantile_that_is_not_there(run_dir: Path, quantile: str) -> None:
    outcome = quark("generate", run_dir, "-p", "a", f"--quantile={quantile}")
    assert outcome.code == 2
    assert "best, none or a number from 0 (worst) to 4" in outcome.err


def test_generate_reads_prompt_files_and_other_models(run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two", "split": "eval"}\n')
    from_model = quark("generate", run_dir / "model", "--prompts", file, "--json").json
    assert [c["prompt"] for c in from_model["completions"]] == ["one", "two"]
    original = quark("generate", "embedded:reviews", "--prompts", file, "--json").json
    assert original["quantile"] is None
    refused = quark("generate", "embedded:reviews", "-p", "a", "--quantile", "best")
    assert refused.code == 2
    assert "no reward tokens" in refused.err
    assert "top_p" in quark("generate", run_dir, "-p", "a", "--top-p", "0").err
    for refused in ("0", "1.5", "nan"):
        assert quark("generate", run_dir, "-p", "a", "--top-p", refused).code == 2
    option = " ".join(quark("generate", "--help").out.split("--top-p")[1][:400].split())
    assert "above 0" in option
    assert "0.0<=" not in option
    assert "is not UTF-8" in quark("generate", run_dir, "-p", "\udce9").err
    for prompt in ("<|reward_4|>a", ""):
        refused = quark("generate", run_dir, "-p", prompt)
        assert refused.code == 3, refused.err
        assert "--quantile" in refused.err or "empty prompt" in refused.err
    file.write_text('{"prompt": "one"}\nnot json\n')
    missing = quark("generate", run_dir, "--prompts", tmp_path / "none.txt")
    assert (missing.code, "check --prompts" in missing.err) == (3, True)
    damaged = quark("generate", run_dir, "--prompts", file)
    assert damaged.code == 3
    assert "prompts.jsonl:2" in damaged.err


def test_a_file_of_prompts_is_read_whole_whatever_the_run_chose(
    run_dir: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    config = RunDirectory(copy).config
    config.write_text(config.read_text().replace("[prompts]", '[prompts]\nwhere = "n > 5"'))
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one", "n": 1}\n{"prompt": "two", "n": 9}\n')
    answers = quark("generate", copy, "--prompts", file, "--json").json["completions"]
    assert [answer["prompt"] for answer in answers] == ["one", "two"]


def test_generate_shows_the_prompt_and_what_follows(run_dir: Path) -> None:
    outcome = quark("generate", run_dir, "-p", "the battery", "-n", "3")
    assert outcome.code == 0
    assert [line[:11] for line in outcome.out.splitlines()] == ["the battery"] * 3


def test_a_run_without_a_model_says_so(run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    for folder in (RunDirectory(copy).model, RunDirectory(copy).checkpoints):
        shutil.rmtree(folder)
    outcome = quark("generate", copy, "-p", "a")
    assert outcome.code == 4
    assert "has no checkpoint yet" in outcome.err


def test_a_mistyped_run_is_not_sought_on_the_hub(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = run_dir.parent
    monkeypatch.chdir(runs.parent)
    outcome = quark("evaluate", f"{runs.name}/rum")
    assert outcome.code == 4
    assert f"there is no run {runs.name}/rum; {runs.name} has {run_dir.name}" in outcome.err


def test_evaluate_repeats_the_figures_of_training(run_dir: Path, trained: Outcome) -> None:
    outcome = quark("evaluate", run_dir, "--json")
    assert outcome.code == 0, outcome.err
    measured = outcome.json
    assert [e["quantile"] for e in measured["evaluations"]] == [None, 0, 1, 2, 3, 4]
    assert measured["evaluations"][0]["reward_mean"] == pytest.approx(trained.json["reward_before"])
    assert measured["control_curve"] == pytest.approx(trained.json["control_curve"], abs=1e-6)
    best = measured["evaluations"][-1]
    assert best["kl_policy_to_reference"] == pytest.approx(
        trained.json["kl_policy_to_reference"], rel=1e-3
    )
    assert set(best) >= {"perplexity_reference", "distinct_1", "distinct_2", "judges"}


def test_evaluate_takes_rewards_prompts_and_quantiles(run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the menu\nthe screen\n")
    wishes = ("--reward", "length", "--reward", "vader", "--prompts", file, "--quantile", "best")
    measured = quark("evaluate", run_dir, *wishes, "--json").json
    assert measured["reward"] == "length"
    assert [e["quantile"] for e in measured["evaluations"]] == [4]
    assert set(measured["evaluations"][0]["judges"]) == {"vader"}
    assert measured["control_curve"] is None
    people = quark("evaluate", run_dir, *wishes)
    assert "4 (best)" in people.out
    assert quark("evaluate", run_dir, "--reward", "no-such-reward").code == 2
    model = quark("evaluate", run_dir / "model")
    assert model.code == 2
    assert "--reference" in model.err


def test_evaluate_with_a_reward_that_scores_nothing_fails(run_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        "def f(*, prompts, completions):\n    raise KeyError('lost')\n"
        "def half(*, prompts, completions):\n    return [0.5 if i % 2 else None for i in range(len(prompts))]\n"
    )
    command = ("evaluate", run_dir, "-q", "best", "-q", "none", "--json")
    failed = quark(*command, "--reward", f"{broken}:f")
    assert (failed.code, failed.out) == (3, "")
    assert "scored none of 32 completions" in failed.err
    assert "KeyError: 'lost'" in failed.err
    # What a part of the completions lacks, or a judge, is said and counted.
    for names in ((f"{broken}:half",), ("length", f"{broken}:f")):
        partial = quark(*command, *(part for name in names for part in ("--reward", name)))
        assert partial.code == 0, partial.err
        assert (
            f"{'8' if len(names) == 1 else '16'} of 16 held-out completions got no score"
            in partial.err
        )
    assert [e["failed_scores"] for e in partial.json["evaluations"]] == [0, 0]


def test_code_named_by_a_run_directory_is_not_run(run_dir: Path, tmp_path: Path) -> None:
    module = tmp_path / "planted.py"
    proof = tmp_path / "it-ran"
    module.write_text(
        f"open({str(proof)!r}, 'w').close()\n"
        "def reward(*, prompts, completions):\n    return [0.0] * len(completions)\n"
    )
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    config = RunDirectory(copy).config
    name = json.dumps(f"{module}:reward")
    original = config.read_text()
    for setting, planted in (
        ('judges = ["vader"]', f"judges = [{name}]"),
        ('name = "sentiment"', f"name = {name}"),
    ):
        assert setting in original
        config.write_text(original.replace(setting, planted))
        for command in (["evaluate", copy], ["generate", copy, "-p", "a"], ["report", copy]):
            quark(*command)
        assert not proof.exists()
        assert f"--allow {module}:reward" in quark("evaluate", copy).err
    trusted = quark("evaluate", copy, "--reward", f"{module}:reward", "-q", "best", "--json")
    assert trusted.code == 0, trusted.err
    assert proof.exists()


def test_pool_info_has_the_documented_fields(run_dir: Path) -> None:
    info = quark("pool", "info", run_dir, "--json").json
    assert info["samples"] == 60
    assert info["snapshot"]["num_samples"] == 60
    assert "reward" in info["score_columns"]
    assert info["bytes"] > 0
    assert quark("pool", "info", run_dir / "pool", "--json").json == info
    assert "60" in quark("pool", "info", run_dir).out


def test_pool_head_shows_the_first_the_best_and_one_quantile(run_dir: Path) -> None:
    def head(*options: str) -> list[dict[str, object]]:
        samples: list[dict[str, object]] = quark("pool", "head", run_dir, *options, "--json").json[
            "samples"
        ]
        return samples

    assert [sample["id"] for sample in head()] == list(range(10))
    best = head("--best", "--num", "60")
    rewards = [sample["scores"]["reward"] for sample in best]  # type: ignore[index]
    assert rewards == sorted(rewards, reverse=True)
    assert {sample["quantile"] for sample in best[:12]} == {4}
    assert {sample["quantile"] for sample in head("--quantile", "0", "-n", "60")} == {0}
    assert len(head("--quantile", "0", "-n", "60")) == 12
    assert set(best[0]) >= {"round", "prompt", "completion", "reward_token", "logprob_policy"}
    assert quark("pool", "head", run_dir, "--quantile", "5").code == 2
    wrong = quark("pool", "head", run_dir, "--score", "rewrad")
    assert wrong.code == 2
    assert "it has: reward" in wrong.err


def test_pool_stats_agree_with_the_pool(run_dir: Path) -> None:
    stats = quark("pool", "stats", run_dir, "--num-quantiles", "4", "--json").json
    with NativePool.open(RunDirectory(run_dir).pool) as pool:
        rewards = pool.scores("reward").astype(np.float64)
        bounds = pool.quantize(4).lower_bounds
    assert stats["samples"] == 60
    assert stats["columns"]["reward"]["mean"] == pytest.approx(rewards.mean())
    assert stats["columns"]["reward"]["nan"] == 0
    assert stats["quantile_counts"] == [15] * 4
    assert stats["quantile_lower_bounds"] == pytest.approx(bounds.tolist())
    assert sum(part["samples"] for part in stats["histogram"]) == 60
    assert [(row["round"], row["samples"]) for row in stats["rounds"]] == [(0, 40), (1, 20)]
    assert stats["rounds"][1]["mean"] == pytest.approx(rewards[40:].mean())
    assert "Histogram of reward" in quark("pool", "stats", run_dir).out


@pytest.mark.parametrize("per_prompt", [False, True])
def test_a_run_and_pool_stats_say_one_share_of_ties(tmp_path: Path, per_prompt: bool) -> None:
    reward = tmp_path / "coarse.py"
    reward.write_text(
        "def coarse(*, prompts, completions):\n    return [float(len(text) > 20) for text in completions]\n"
    )
    ranking = f"pool.per_prompt={str(per_prompt).lower()}"
    trained_run(tmp_path / "run", f"reward.name={reward}:coarse", ranking)
    rows = map(json.loads, RunDirectory(tmp_path / "run").metrics.read_text().splitlines())
    said = [row["tie_share"] for row in rows if row["event"] == "round"][-1]
    stats = quark("pool", "stats", tmp_path / "run", "--json").json
    assert stats["tie_share"] == said > 0.0
    assert stats["columns"]["reward"]["repeated_share"] > 0.9
    assert "the tie rule chose" in quark("pool", "stats", tmp_path / "run").out


def test_pool_verify_finds_damage(run_dir: Path, tmp_path: Path) -> None:
    sound = quark("pool", "verify", run_dir, "--json")
    assert sound.code == 0
    assert sound.json["sound"] is True
    copy = shutil.copytree(RunDirectory(run_dir).pool, tmp_path / "pool")
    largest = max((p for p in copy.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    damaged = quark("pool", "verify", copy, "--json")
    assert damaged.code == 4
    assert damaged.json["problems"]
    assert "damaged: " in quark("pool", "verify", copy).out
    assert quark("pool", "info", tmp_path / "none").code == 3


def test_pool_rescore_replaces_or_adds_a_column(run_dir: Path, tmp_path: Path) -> None:
    pool = shutil.copytree(RunDirectory(run_dir).pool, tmp_path / "pool")
    before = quark("pool", "head", pool, "--num", "60", "--json").json["samples"]
    done = quark("pool", "rescore", pool, "vader", "--chunk-size", "25", "--json")
    assert done.code == 0, done.err
    assert done.json["samples"] == 60
    assert (done.json["score"], done.json["version"], done.json["failed"]) == ("reward", 2, 0)
    assert "50 of 60 samples" in done.err
    after = quark("pool", "head", pool, "--num", "60", "--json").json["samples"]
    texts = [sample["completion"] for sample in after]
    assert texts == [sample["completion"] for sample in before]
    expected = build_reward(RewardConfig(name="vader"))(prompts=[""] * 60, completions=texts)
    rewards = [sample["scores"]["reward"] for sample in after]
    assert rewards == pytest.approx(expected, abs=1e-6)
    assert rewards != [sample["scores"]["reward"] for sample in before]
    added = quark("pool", "rescore", pool, "length", "--as", "words")
    assert added.code == 0
    assert "version 1" in added.out
    columns = quark("pool", "info", pool, "--json").json["score_columns"]
    assert columns["reward"]["source"]["name"] == "vader"
    assert "words" in columns
    assert "by vader" in quark("pool", "info", pool).out
    assert quark("pool", "rescore", pool, "no-such-reward").code == 2
    assert quark("pool", "verify", pool).code == 0


def test_report_writes_the_page(run_dir: Path, tmp_path: Path) -> None:
    outcome = quark("report", run_dir, "--output", tmp_path / "page.html", "--json")
    assert outcome.json["bytes"] == (tmp_path / "page.html").stat().st_size
    assert "<svg" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert RunDirectory(run_dir).report.is_file()  # by `train`


def test_config_shows_values_origins_presets_and_schema(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('preset = "demo"\n[run]\nseed = 5\n')
    shown = quark("config", "show", file, "--set", "run.num_rounds=3", "--json").json
    assert shown["config"]["run"] | {"seed": 5, "num_rounds": 3} == shown["config"]["run"]
    assert shown["origins"]["run.seed"] == f"file {file}"
    assert shown["origins"]["run.num_rounds"] == "--set"
    assert shown["origins"]["run.steps_per_round"] == "preset demo"
    assert "run.seed" in quark("config", "show", file).out
    assert "demo" in quark("config", "list", "--json").json["presets"]
    assert "demo" in quark("config", "list").out
    assert "run" in quark("config", "schema").json["properties"]


def test_init_writes_a_file_that_loads_and_never_overwrites(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    assert quark("init", file, "--full", "--preset", "demo").code == 0
    text = file.read_text(encoding="utf-8")
    assert text.count("# ") > 30
    assert tomllib.loads(text)["model"]["name"] == "embedded:reviews"
    shown = quark("config", "show", file, "--json").json["config"]
    assert shown == quark("config", "show", "demo", "--json").json["config"]
    file.write_text("mine")
    refused = quark("init", file)
    assert refused.code == 2
    assert "--force" in refused.err
    assert file.read_text() == "mine"
    assert quark("init", file, "--force", "--preset", "paper").code == 0
    assert quark("init", tmp_path).code == 0
    assert (tmp_path / "quark.toml").is_file()


def test_doctor_finds_everything_that_is_needed() -> None:
    outcome = quark("doctor", "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json["healthy"] is True
    states = {finding["name"]: finding["state"] for finding in outcome.json["findings"]}
    assert states["pool extension"] == states["torch"] == states["model reviews"] == "ok"
    for finding in outcome.json["findings"]:
        assert finding["state"] == "ok" or finding["way_out"] or finding["name"] == "cuda"
    assert "all that is needed is here" in quark("doctor").out


def test_the_guide_to_the_metrics_reads_those_of_a_run(run_dir: Path) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(block.replace("runs/demo", str(run_dir)), names)
    assert names["steps"]["step"].to_list() == [0, 1, 2, 3]


def test_what_a_reward_prints_goes_to_stderr(run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "talks.py"
    file.write_text(
        "print('loaded')\n"
        "def score(prompts, completions):\n"
        "    print('scoring', len(completions))\n"
        "    return [len(text) for text in completions]\n"
    )
    reward = f"{file}:score"
    pool = shutil.copytree(run_dir / "pool", tmp_path / "pool")
    setting = f"reward.name={reward}"
    for command in (
        ("reward", "check", reward),
        ("pool", "rescore", pool, reward),
        ("evaluate", run_dir, "--reward", reward, "--quantile", "none"),
        ("train", "--run-dir", tmp_path / "run", *TINY_RUN, "--set", setting),
        ("train", "--run-dir", tmp_path / "run", *TINY_RUN, "--set", setting, "--dry-run"),
    ):
        outcome = quark(*command, "--json")
        assert (outcome.code, isinstance(outcome.json, dict)) == (0, True), outcome.err
        assert "loaded\n" in outcome.err
        assert "scoring " in outcome.err


def test_reward_check_judges_a_reward(tmp_path: Path) -> None:
    good = quark("reward", "check", "sentiment", "--json")
    assert good.code == 0
    assert good.json["usable"] is True
    assert good.json["num_failed"] == 0
    file = tmp_path / "rewards.py"
    file.write_text(
        "def constant(*, prompts, completions):\n    return [1.0] * len(completions)\n"
        "def short(*, prompts, completions):\n    return [1.0]\n"
    )
    constant = quark("reward", "check", f"{file}:constant")
    assert constant.code == 3
    assert "could not learn" in constant.out
    short = quark("reward", "check", f"{file}:short")
    assert short.code == 3
    assert "1 score for" in short.err
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"prompt": "a", "completion": "good"}\n{"completion": "bad"}\n')
    assert (
        quark("reward", "check", "vader", "--samples", samples, "--json").json["num_samples"] == 2
    )
    file.write_text(
        "def by_prompt(*, prompts, completions):\n    return [float(len(p)) for p in prompts]\n"
    )
    samples.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a", "completion": "x"}\n{"prompt": "bc", "completion": "x"}\n'
    )
    judged = quark("reward", "check", f"{file}:by_prompt", "--samples", samples, "--json")
    assert (judged.code, judged.json["is_constant"], judged.json["repeated_share"]) == (
        0,
        False,
        0.0,
    )
    for bad in (b'{"prompt": "a"}\n', b'{"completion": "\xff"}\n'):
        samples.write_bytes(bad)
        refused = quark("reward", "check", "vader", "--samples", samples)
        assert refused.code == 3
        assert "samples.jsonl:1" in refused.err
    longest = quark("reward", "check", "length", "--set", "reward.length.maximum=1", "--json")
    assert longest.json["maximum"] == 1.0


def test_a_scorer_can_be_trained_and_used(tmp_path: Path) -> None:
    rows = [
        {"text": f"{'good great' if i % 2 else 'bad poor'} number {i}", "label": i % 2}
        for i in range(400)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = quark("reward", "train", data, "--output", tmp_path / "scorer", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["auc"] > 0.99
    assert quark("reward", "check", tmp_path / "scorer", "--json").json["reward"] == "scorer"
    for bad in (b'{"text": "a"}\n', b'{"text": "\xff", "label": 1}\n'):
        data.write_bytes(bad)
        refused = quark("reward", "train", data, "--output", tmp_path / "other")
        assert refused.code == 3
        assert "data.jsonl:1" in refused.err


def test_hostile_prompts_cannot_act_on_the_terminal(run_dir: Path, tmp_path: Path) -> None:
    texts = [
        t for t in HOSTILE if 0 < len(t) < 60 and "\0" not in t and t.strip() and "\ud800" not in t
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    outcome = quark("generate", run_dir, "--prompts", file, "--max-new-tokens", "2")
    assert outcome.code == 0, outcome.err
    assert all(c.isprintable() or c == "\n" for c in outcome.out)
    shown = quark("generate", run_dir, "--prompts", file, "--max-new-tokens", "2", "--json")
    assert shown.out.isascii()
    assert [c["prompt"] for c in shown.json["completions"]] == texts


def test_a_process_of_its_own_prints_nothing_but_the_json_object(tmp_path: Path) -> None:
    outcome = quark_process("train", "--run-dir", tmp_path / "run", *TINY_RUN, "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.json["samples"] == 60
    assert outcome.err == ""
