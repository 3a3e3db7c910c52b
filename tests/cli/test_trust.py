"""A stranger's run through every command that takes one: it reaches nothing that its user did not allow."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from quark.api.run import Run, load
from quark.cli.app import app
from quark.config.load import load_config
from quark.errors import ConfigError
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from tests.cli.commands import TINY_RUN, quark
from tests.planted import PLANTS, SECRET, Plant, recorded
from tests.tiny import save_tiny

VARIABLE = "STRANGERS_WISH_TOKEN"
URL = "http://127.0.0.1:9/score"

COMMANDS: dict[str, tuple[tuple[str, ...], int]] = {
    "train": (("RUN/config.toml", "--run-dir", "RUN"), 2),
    "generate": (("RUN", "-p", "a", "--max-new-tokens", "2"), 0),
    "evaluate": (("RUN",), 2),
    "compare": (("RUN",), 2),
    "frontier": (("RUN",), 2),
    "fit": (("RUN",), 2),
    "model export": (("RUN", "OUT/model"), 0),
    "push": (("RUN", "me/model"), 2),
    "runs": (("RUN",), 0),
    "view": (("RUN", "--seconds", "0.1"), 0),
    "overopt": (("RUN", "--gold", "vader"), 0),
    "report": (("RUN",), 0),
    "pool info": (("RUN",), 0),
    "pool head": (("RUN", "--best"), 0),
    "pool stats": (("RUN",), 0),
    "pool verify": (("RUN",), 0),
    "pool explain": (("RUN", "0"), 0),
    "pool rescore": (("RUN", "length", "--as", "length"), 0),
    "pool query": (("RUN", "SELECT COUNT(*) AS n FROM pool"), 0),
    "pool export": (("RUN", "OUT/rows.parquet"), 0),
    "pool merge": (("OUT/merged", "RUN"), 0),
    "pool fork": (("RUN", "OUT/fork"), 0),
    "pool compact": (("RUN",), 0),
    "pool retain": (("RUN", "--max-samples", "20"), 0),
    "pool gc": (("RUN", "--dry-run"), 0),
    "config show": (("RUN/config.toml",), 0),
}
"""Every command that takes a run: its arguments, and the status that it ends with."""
WITHOUT_A_RUN = {
    "init",
    "doctor",
    "selftest",
    "config list",
    "config schema",
    "reward train",
    "reward check",
    "pool create",
    "pool import",
}


def leaves(group: Any, prefix: str = "") -> Iterator[str]:
    """The full names of a group's commands."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


def test_every_command_is_known_here() -> None:
    known = COMMANDS.keys() | WITHOUT_A_RUN
    assert set(leaves(typer.main.get_command(app))) == known, (
        "say of a new command whether it takes a run"
    )


@pytest.fixture
def strangers_run(run_dir: Path, tmp_path: Path) -> Path:
    """A run whose configuration wishes for everything that one can name."""
    wishes = tmp_path / "wishes"
    wishes.mkdir()
    (wishes / "private.txt").write_text("a private line\n" * 20)
    (wishes / "planted.py").write_text(
        f"open({str(wishes / 'it-ran')!r}, 'w').close()\n"
        "def score(*, prompts, completions):\n    return [0.0] * len(completions)\n"
    )
    run = RunDirectory(shutil.copytree(run_dir, tmp_path / "run"))
    text = run.config.read_text()
    for old, new in (
        ('name = "embedded:reviews"', 'name = "stranger/model"'),
        ('source = "embedded:reviews"', f"source = {json.dumps(str(wishes / 'private.txt'))}"),
        ('name = "sentiment"', 'name = "http"'),
        (
            'judges = ["vader"]',
            f"judges = [{json.dumps(f'{wishes}/planted.py:score')}, 'classifier']",
        ),
        (
            'extra_scores = ["vader"]',
            f"extra_scores = [{json.dumps(f'{wishes}/planted.py:score')}]",
        ),
        ("trackers = []", 'trackers = ["wandb"]'),
        ('backend = "transformers"', 'backend = "http"'),
        ('reload_url = ""', f'reload_url = "{URL}/reload"'),
        ('[reward.classifier]\nmodel = ""', '[reward.classifier]\nmodel = "stranger/classifier"'),
    ):
        assert old in text, old
        text = text.replace(old, new, 1)
    text = text.replace('url = ""\n', f'url = "{URL}"\napi_key_env = "{VARIABLE}"\n')
    run.config.write_text(text)
    assert load_config(run.config).config.reward.http.api_key_env == VARIABLE
    return run.path


def test_a_run_that_begins_with_a_strangers_samples_reaches_nothing_of_theirs(
    strangers_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "secret")
    new = tmp_path / "new"
    one_round = ("--set", "run.num_rounds=1", "--set", "evaluation.control_curve=false")
    with recorded() as reached:
        outcome = quark(
            "train",
            *TINY_RUN,
            *one_round,
            "--from-pool",
            strangers_run,
            "--run-dir",
            new,
            "--quiet",
        )
    assert outcome.code == 0, outcome.err
    assert reached.network == reached.processes == []
    assert VARIABLE not in reached.variables
    assert not any(path.is_relative_to(tmp_path / "wishes") for path in reached.files)
    with NativePool.open(new / "pool") as pool, NativePool.open(strangers_run / "pool") as theirs:
        assert len(pool) == len(theirs)
        assert set(pool.column("round").tolist()) == {0}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_strangers_run_reaches_nothing(
    strangers_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv(VARIABLE, "secret")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    out = tmp_path / "out"
    out.mkdir()
    if command == "pool merge":
        assert quark("pool", "fork", strangers_run, out / "merged").code == 0
    arguments, code = COMMANDS[command]
    places = {"RUN": str(strangers_run), "OUT": str(out)}
    filled = []
    for argument in arguments:
        head, slash, tail = argument.partition("/")
        filled.append(places.get(head, head) + slash + tail)
    with recorded() as reached:
        outcome = quark(*command.split(), *filled)
    assert outcome.code == code, outcome.err
    assert reached.network == reached.processes == []
    assert VARIABLE not in reached.variables
    allowed = [tmp_path / "run", out, tmp_path / "state"]
    ours = [path for path in reached.files if path.is_relative_to(tmp_path)]
    assert [p for p in ours if not any(p.is_relative_to(folder) for folder in allowed)] == [
        path
        for path in ours
        if command in ("train", "evaluate", "compare", "frontier") and path.name == "planted.py"
    ], "code is read for its hash, where it is asked for, and nothing else"
    assert not (tmp_path / "wishes" / "it-ran").exists()
    if command == "fit":
        assert "hub:stranger/model" in outcome.err
        assert URL not in outcome.err, "it generates nothing and scores nothing"
    elif command == "push":
        assert "--yes" in outcome.err, "it asks before it connects"
    elif code:
        for thing in (URL, f"${VARIABLE}", "hub:stranger/model", "hub:stranger/classifier"):
            assert thing in outcome.err
        assert f"{tmp_path}/wishes/planted.py:score" in outcome.err
        # An evaluation takes the prompts that the run recorded.
        assert (f"{tmp_path}/wishes/private.txt" in outcome.err) == (command == "train")


def test_a_strangers_run_reaches_nothing_from_python(
    strangers_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "secret")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with recorded() as reached:
        run = Run(strangers_run)
        assert run.config.reward.name == "http"
        assert run.metrics.height > 0
        with run.pool as pool:
            assert len(pool) > 0
        for source in (run, load(strangers_run)):
            assert source.generate("a", max_new_tokens=2)
        run.export(tmp_path / "out")
        run.report()
        for using in (run.evaluate, run.frontier, lambda: run.resume(num_rounds=9)):
            with pytest.raises(ConfigError, match="hub:stranger/model"):
                using()
        assert run.push("me/model", confirm=lambda _: False) is None
    assert reached.network == reached.processes == []
    assert VARIABLE not in reached.variables
    wishes = tmp_path / "wishes"
    assert {p.name for p in reached.files if p.is_relative_to(wishes)} <= {"planted.py"}
    assert not (wishes / "it-ran").exists()


_SINGLE_WISHES = {
    "extra scores": {'extra_scores = ["vader"]': "extra_scores = [CODE]"},
    "gold": {"[pool]\n": "[pool]\ngold = CODE\n"},
    "a member": {
        'name = "sentiment"': 'name = "ensemble"',
        "members = []": "members = [CODE, 'vader']",
    },
    "a model below adapters": {'name = "embedded:reviews"': "name = MODEL", "rank = 0": "rank = 2"},
    "a server": {
        'backend = "transformers"': 'backend = "http"',
        '[sampling.http]\nurl = ""': f'[sampling.http]\nurl = "{URL}"\napi_key_env = "{VARIABLE}"',
        'reload_url = ""': f'reload_url = "{URL}/reload"',
        "trackers = []": 'trackers = ["wandb"]',
    },
}
"""Replacements in the configuration of a run that leave everything else as it was: what a command asks about first must
not hide that it does not ask about another thing."""


@pytest.mark.parametrize("wish", _SINGLE_WISHES)
@pytest.mark.parametrize("command", ["evaluate", "compare", "frontier", "generate"])
def test_a_single_wish_is_not_granted_either(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, wish: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    wishes = tmp_path / "wishes"
    save_tiny(wishes / "model")
    code = wishes / "planted.py"
    code.write_text(f"open({str(wishes / 'it-ran')!r}, 'w').close()\n")
    run = RunDirectory(shutil.copytree(run_dir, tmp_path / "run"))
    text = run.config.read_text()
    for old, new in _SINGLE_WISHES[wish].items():
        new = new.replace("CODE", json.dumps(f"{code}:score"))
        text = text.replace(old, new.replace("MODEL", json.dumps(str(wishes / "model"))), 1)
    run.config.write_text(text)
    assert load_config(run.config).config != load_config(run_dir / "config.toml").config
    more = {
        "generate": ("-p", "a"),
        "frontier": ("--guidance", "1"),
        "evaluate": ("-q", "best"),
    }.get(command, ())
    with recorded() as reached:
        outcome = quark(command, run.path, *more)
    assert outcome.code in (0, 2), outcome.err
    assert outcome.code == 0 or "--allow" in outcome.err
    assert reached.network == reached.processes == []
    assert VARIABLE not in reached.variables
    assert [p for p in reached.files if p.is_relative_to(wishes) and p != code] == []
    assert not (wishes / "it-ran").exists()


def test_ones_own_run_asks_nothing_until_it_changes(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    code = tmp_path / "mine.py"
    code.write_text(
        "def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    run = RunDirectory(shutil.copytree(run_dir, tmp_path / "run"))
    setting = ("--set", f"evaluation.judges=['{code}:score']")
    # The run is finished, so this only makes it the user's own.
    own = load_config(run.config)
    again = quark("train", run.config, "--run-dir", run.path, *setting, "--quiet")
    assert again.code == 0, again.err
    assert own.config.evaluation.judges == ("vader",)
    quick = ("-q", "none", "--json")
    measured = quark("evaluate", run.path, *quick)
    assert measured.code == 0, measured.err
    assert f"{code}:score" in measured.json["evaluations"][0]["judges"]
    code.write_text(code.read_text() + "# changed\n")
    asked = quark("evaluate", run.path, *quick)
    assert (asked.code, f"--allow {code}:score" in asked.err) == (2, True)
    assert quark("evaluate", run.path, *quick, "--allow", f"{code}:score").code == 0
    assert quark("evaluate", run.path, *quick).code == 0


_READ = {
    "run.json": (["report"], ["overopt"], ["runs"], ["pool", "explain"]),
    "config.toml": (
        ["report"],
        ["overopt"],
        ["runs"],
        ["generate"],
        ["evaluate"],
        ["compare"],
        ["frontier"],
        ["push"],
        ["pool", "head"],
        ["pool", "explain"],
        ["fit"],
    ),
    "metrics.jsonl": (["report"], ["overopt"], ["runs"], ["pool", "explain"]),
    "held_out.jsonl": (["evaluate"], ["compare"], ["frontier"]),
    "frontier.json": (["generate"], ["overopt"]),
    "model/config.json": (["generate"], ["evaluate"], ["compare"], ["push"]),
    "model/quark_reward_tokens.json": (["generate"],),
    "checkpoints/step-00000004/state.json": (["pool", "gc"],),
}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("file", _READ)
def test_a_planted_file_of_a_run_is_not_read(
    run_dir: Path, tmp_path: Path, plant: Plant, file: str
) -> None:
    run = shutil.copytree(run_dir, tmp_path / "a" / "run")
    plant(run / file)
    for command in _READ[file]:
        more = {
            "generate": ["-p", "a"],
            "explain": ["0"],
            "overopt": ["--gold", "vader"],
            "push": ["me/model"],
        }.get(command[-1], [])
        with recorded() as reached:
            outcome = quark(*command, run, *more)
        if command == ["runs"]:
            assert outcome.code == 0, outcome.err
            assert "damaged" in outcome.out or "no runs" in outcome.out
        elif file == "frontier.json" and command != ["generate"]:
            assert outcome.code == 0, "they show what else there is"
        else:
            assert outcome.code in (2, 3, 4), f"{command}: {outcome.err}"
            assert "--yes" not in outcome.err
        assert reached.network == reached.processes == []
        assert SECRET.read_text()[:10] not in outcome.out + outcome.err
        assert not {SECRET, Path("/dev/zero")} & set(reached.files)
    refused = quark("train", "demo", "--run-dir", run)
    assert refused.code in (3, 4)


def test_nothing_is_written_or_deleted_through_a_link(run_dir: Path, tmp_path: Path) -> None:
    precious = shutil.copytree(run_dir, tmp_path / "precious")
    before = {p: p.read_bytes() for p in precious.rglob("*") if p.is_file()}
    for place in (
        "pool",
        "checkpoints",
        "model",
        "metrics.jsonl",
        "report.html",
        "config.toml.partial",
    ):
        run = shutil.copytree(run_dir, tmp_path / place)
        target, path = precious / place, run / place
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target if target.exists() else precious / "report.html")
        assert quark("train", "demo", "--run-dir", run, "--fresh", "--force").code == 4
        assert quark("train", "demo", "--run-dir", run).code == 4
        if place == "pool":
            for command in (["gc"], ["compact"], ["retain", "--max-samples", "1"]):
                for name in (run, path):
                    assert quark("pool", command[0], name, *command[1:]).code == 4
        quark("report", run)
    assert {p: p.read_bytes() for p in precious.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_report_is_as_readable_as_the_user_wishes(
    run_dir: Path, tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        assert quark("report", run_dir, "-o", tmp_path / "page.html").code == 0
    finally:
        os.umask(before)
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o666 & ~umask
