"""Everyday mistakes: each message says what is wrong in plain words, and how to go on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from quark.installing import install_command
from tests.cli.commands import ROOT, quark
from tests.tiny import save_tiny, tiny_gpt2, tiny_llama

LIBRARY_WORDS = re.compile(
    r"[Ii]nput should|valid (tuple|integer|number|string|boolean)|instance of|[Ff]ield required"
)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("run=3", "must be a table of settings"),
        ("run.num_rounds=many", "must be a whole number"),
        ("run.num_rounds=1.5", "must be a whole number"),
        ("run.num_rounds=0", "must be at least 1"),
        ("pool.store_text=7", "must be true or false"),
        ("sampling.temperature=warm", "must be a number"),
        ("sampling.temperature=inf", "must be a finite number"),
        ("sampling.http.timeout_s=0", "must be greater than 0"),
        ("alerts.control_gap_below=1", "must be less than 1"),
        ("alerts.failed_share_above=2", "must be at most 1"),
        ("model.name=3", "must be a text in quotes"),
        ("model.dtype=int8", "must be 'float32', 'bfloat16' or 'float16'"),
        ("pool.ties=x", "must be 'hash', "),
        ("tracking.trackers=wandb", "must be a list"),
        ("optimizer.betas=[0.9]", "has too few values"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "has more than 2 values"),
    ],
)
def test_what_is_expected_of_a_setting_is_said_in_plain_words(setting: str, expected: str) -> None:
    outcome = quark("config", "show", "--set", setting)
    assert outcome.code == 2
    assert expected in outcome.err
    assert setting.partition("=")[0] in outcome.err
    assert not LIBRARY_WORDS.search(outcome.err)


def test_an_option_that_does_not_fit_is_said_in_plain_words(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    for option, value, reason in (
        ("--guidance", "inf", "guidance = inf: must be a finite number"),
        ("--top-p", "0", "top_p = 0.0: must be greater than 0"),
        ("--top-p", "nan", "top_p = nan: must be a finite number"),
        ("--top-p", "1.5", "top_p = 1.5: must be at most 1"),
    ):
        outcome = quark("generate", folder, "-p", "a", option, value)
        assert outcome.code == 2, outcome.err
        assert reason in outcome.err
        assert not LIBRARY_WORDS.search(outcome.err)


def test_an_unknown_reward_is_not_blamed_on_a_setting(tmp_path: Path) -> None:
    outcome = quark("pool", "rescore", tmp_path, "nosuch")
    assert outcome.code == 2
    assert outcome.err.startswith("error: no reward 'nosuch'; there is sentiment")
    assert quark("reward", "check", "length", "--set", "reward.length.maximum=x").code == 2


def test_a_configuration_that_is_missing_too_large_or_hostile_is_wrong_usage(
    tmp_path: Path,
) -> None:
    path = tmp_path / "my.toml"
    assert quark("config", "show", path).code == 2
    for content, reason in (
        ("#" * (1 << 16) + "\n", "more than 65,536 bytes"),
        ("a" + ".a" * 30_000 + " = 1\n", "line 1 has more than 256 dots"),
        ("a = " + "[" * 60_000, "nested too deeply"),
        ("a = " + "{a=" * 20_000, "nested too deeply"),
    ):
        path.write_text(content)
        outcome = quark("config", "show", path)
        assert outcome.code == 2, content[:20]
        assert reason in outcome.err
        assert len(outcome.err) < 1000


def test_a_remedy_names_the_package_in_the_versions_that_are_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for name in (
        "gguf",
        "lora",
        "tensorboard",
        "wandb",
        "trackio",
    ):  # the package that each is named for
        requirement = extras[name][0]
        package = re.match(r"[\w-]+", requirement)[0]  # type: ignore[index]
        assert install_command(package) == f"pip install '{requirement}'"
    assert install_command("torch") == f"pip install '{project['dependencies'][0]}'"
    assert install_command("no-such-package") == "pip install no-such-package"


def test_no_text_tells_to_install_a_package_that_is_not_published() -> None:
    requirements = set(re.findall(r'"([\w-]+>=[\w.]+)"', (ROOT / "pyproject.toml").read_text()))
    folders = ("quark", "docs", "benches", "scripts")
    files = [
        file
        for folder in folders
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".md", ".toml")
    ]
    for file in [*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"install '?quark-rl", text), file
        for specifier in re.findall(r"pip install '([\w-]+>=[^']+)'", text):
            assert specifier in requirements, (file, specifier)


def test_a_dry_run_and_a_run_check_cheap_things_before_they_load_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("quark.training.factories.load_policy", loads)
    tracker = ["--set", 'tracking.trackers=["wandb"]']
    prompts = ["--set", f"prompts.evaluation_source={tmp_path / 'none.jsonl'}"]
    reward = ["--set", f"reward.name={tmp_path / 'none.py'}:f"]
    for mode in (["--dry-run"], ["--run-dir", tmp_path / "run"]):
        outcome = quark("train", "demo", *mode, *tracker)
        assert (outcome.code, "pip install 'wandb>=" in outcome.err) == (2, True)
        outcome = quark("train", "demo", *mode, *prompts)
        assert (outcome.code, "there is no prompt file" in outcome.err) == (3, True)
        outcome = quark("train", "demo", *mode, *reward)
        assert (outcome.code, "none.py is not a file" in outcome.err) == (3, True)


def test_a_model_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    for name, model in (("gpt2", tiny_gpt2()), ("llama", tiny_llama())):
        model.save_pretrained(tmp_path / name)
        outcome = quark("generate", tmp_path / name, "-p", "a")
        assert outcome.code == 3
        assert "has no tokenizer: put tokenizer.json" in outcome.err


def test_a_padding_token_that_the_model_does_not_know_is_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "a", tiny_llama())
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 99_999}))
    outcome = quark("generate", folder, "-p", "a")
    assert outcome.code == 3
    assert "pad_token_id in its config.json is beyond its vocab_size" in outcome.err
    folder = save_tiny(tmp_path / "b", tiny_llama())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<pad>"}))
    for command in (
        ["generate", folder, "-p", "a", "-p", "longer"],
        ["train", "demo", "--dry-run", "--set", f"model.name={folder}"],
    ):
        outcome = quark(*command)
        assert outcome.code == 3
        assert "its tokenizer pads with token 257, and its vocabulary has 257 rows" in outcome.err


def test_an_error_of_a_reward_names_the_line_of_the_users_code(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import json\n\ndef reward(prompts, completions):\n    return parse('{')\n\n"
        "def parse(text):\n    return json.loads(text)\n\nclass Broken:\n    def __init__(self):\n        self.x = 1 / 0\n"
        "    def __call__(self, prompts, completions):\n        return []\n"
    )
    outcome = quark("reward", "check", f"{path}:reward")
    assert outcome.code == 3
    assert "JSONDecodeError: Expecting property name" in outcome.err
    assert f"({path}:7)" in outcome.err
    outcome = quark("reward", "check", f"{path}:reward", "--set", "reward.timeout_s=9")
    assert f"({path}:7)" in outcome.err
    assert f"division by zero ({path}:11)" in quark("reward", "check", f"{path}:Broken").err
    path.write_text("x = 1\ny = x / 0\n")
    assert f"division by zero ({path}:2)" in quark("reward", "check", f"{path}:reward").err


def test_training_a_scorer_leaves_alone_what_is_there(tmp_path: Path) -> None:
    data, folder = tmp_path / "data.jsonl", tmp_path / "mine"
    data.write_text("")
    folder.mkdir()
    assert "0 texts" in quark("reward", "train", data, "-o", folder).err  # an empty folder is fine
    (folder / "README.md").write_text("mine")
    for flags in ([], ["--force"]):
        outcome = quark("reward", "train", data, "-o", folder, *flags)
        assert outcome.code == 2
        assert "holds files that are not a scorer" in outcome.err
    (folder / "scorer.json").write_text("{}")
    outcome = quark("reward", "train", data, "-o", folder)
    assert outcome.code == 2
    assert "add --force to replace it" in outcome.err
    assert "0 texts" in quark("reward", "train", data, "-o", folder, "--force").err
    assert (folder / "README.md").read_text() == "mine"
    assert "is a file" in quark("reward", "train", data, "-o", data).err


def test_a_report_into_a_folder_is_a_file_in_it(run_dir: Path, tmp_path: Path) -> None:
    outcome = quark("report", run_dir, "-o", tmp_path, "--json")
    assert outcome.json["report"] == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()


def test_a_completion_that_shows_nothing_is_marked() -> None:
    from quark.cli.console import completed, continued

    assert continued("Pros:", "").plain == "Pros: (empty)"
    assert continued("Pros:", "  ").plain == "Pros: (blank)"
    assert continued("Pros:", " easy ").plain == "Pros: easy "
    assert completed(" easy ", limit=9).plain == "easy"


@pytest.mark.parametrize(
    "command",
    [["--help"], ["pool", "--help"], ["--version"], ["config", "schema"], ["no-such"]],
    ids=" ".join,
)
def test_a_reader_that_leaves_ends_a_command_quietly(command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `head` that has seen enough
    try:
        process = subprocess.run(
            [sys.executable, "-m", "quark", *command],
            stdout=writing,
            stderr=writing if command == ["no-such"] else subprocess.PIPE,
            text=True,
            cwd=ROOT,
            timeout=300,
            check=False,
        )
    finally:
        os.close(writing)
    assert not process.stderr
    assert process.returncode == 141
