"""A reward is its content: samples that another one scored are not ranked beside its own."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quark.assets import asset_path
from quark.errors import ConfigError
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from tests.cli.commands import quark
from tests.training.tiny_run import NUM_ROUNDS, Listener, train, write_inputs

FUNCTION = "def f(prompts, completions):\n    return [len(c) * 1.0 for c in completions]\n"
OTHER = FUNCTION.replace("1.0", "-1.0")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def edit_function(folder: Path) -> tuple[str, Callable[[], None], Callable[[], None], str]:
    file = folder / "mine.py"
    file.write_text(FUNCTION)
    return f"{file}:f", lambda: _write(file, OTHER), lambda: _write(file, FUNCTION), "mine.py"


def edit_helper(folder: Path) -> tuple[str, Callable[[], None], Callable[[], None], str]:
    """A module beside it, imported late, by way of a package and of another module."""
    package = folder / "scales"
    package.mkdir()
    (package / "__init__.py").write_text("from . import inner\n")
    (package / "inner.py").write_text("SIGN = 1.0\n")
    file = folder / "mine.py"
    file.write_text(
        "def f(prompts, completions):\n"
        "    from scales.inner import SIGN\n"
        "    return [len(c) * SIGN for c in completions]\n"
    )
    inner = package / "inner.py"
    return (
        f"{file}:f",
        lambda: _write(inner, "SIGN = -1.0\n"),
        lambda: _write(inner, "SIGN = 1.0\n"),
        "scales/inner.py",
    )


def edit_scorer(folder: Path) -> tuple[str, Callable[[], None], Callable[[], None], str]:
    """The settings of a scorer's folder: its weights stay, and a reward becomes a penalty."""
    scorer = folder / "scorer"
    shutil.copytree(asset_path("rewards", "sentiment"), scorer)
    file = scorer / "scorer.json"
    before = file.read_text()
    after = json.dumps(json.loads(before) | {"is_penalty": True})
    return str(scorer), lambda: _write(file, after), lambda: _write(file, before), "scorer.json"


def _write(file: Path, text: str) -> None:
    file.write_text(text)
    for name in [n for n in sys.modules if n.partition(".")[0] == "scales"]:
        del sys.modules[name]  # another start of a run is another process


@pytest.mark.parametrize("edit", [edit_function, edit_helper, edit_scorer])
@pytest.mark.parametrize("place", ["reward", "extra score"])
def test_a_reward_edited_in_place_is_refused_until_it_is_set_back_or_has_scored_everything(
    config: Path,
    tmp_path: Path,
    edit: Callable[[Path], tuple[str, Callable[[], None], Callable[[], None], str]],
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    name, change, set_back, file = edit(tmp_path)
    override = f"reward.name={json.dumps(name)}"
    if place == "extra score":
        override = f"pool.extra_scores=[{json.dumps(name)}]"
    run_dir = tmp_path / "run"
    assert train(config, run_dir, overrides=(override,), stop_at=15).interrupted
    identity = RunDirectory(run_dir).identity.read_bytes()
    change()
    with pytest.raises(ConfigError, match=rf"before {re.escape(file)} changed") as refused:
        train(config, run_dir, overrides=(override,))
    assert RunDirectory(run_dir).identity.read_bytes() == identity

    set_back()
    assert train(config, run_dir, overrides=(override,), stop_at=3).interrupted
    change()
    command = str(refused.value).partition("anew: quark ")[2].split()
    assert command[:2] == ["pool", "rescore"]
    outcome = quark(*command)
    assert outcome.code == 0, outcome.err
    assert train(config, run_dir, overrides=(override,)).rounds == NUM_ROUNDS
    column = command[-1] if place == "extra score" else "reward"
    with NativePool.open(RunDirectory(run_dir).pool) as pool:
        texts = [sample.completion_text or "" for sample in pool.samples(range(len(pool)))]
        scores = pool.scores(column)
    if edit is not edit_scorer:
        np.testing.assert_array_equal(scores, [-float(len(text)) for text in texts])


def test_a_judge_may_change(config: Path, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text(FUNCTION)
    override = f"evaluation.judges=['{judge}:f']"
    assert train(config, tmp_path / "run", overrides=(override,), stop_at=15).interrupted
    judge.write_text(OTHER)
    assert train(config, tmp_path / "run", overrides=(override,)).rounds == NUM_ROUNDS


def test_a_reward_that_has_scored_nothing_yet_may_be_corrected(
    config: Path, tmp_path: Path
) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text("def f(prompts, completions):\n    raise ValueError('a bug')\n")
    override = f"reward.name={json.dumps(f'{reward}:f')}"
    with pytest.raises(Exception, match="a bug"):
        train(config, tmp_path / "run", overrides=(override,))
    assert RunDirectory(tmp_path / "run").pool.exists()
    reward.write_text(FUNCTION)
    assert train(config, tmp_path / "run", overrides=(override,)).rounds == NUM_ROUNDS


def test_a_run_of_before_modules_were_known_goes_on_with_the_same_file_alone(
    config: Path, tmp_path: Path
) -> None:
    name, change, set_back, file = edit_function(tmp_path)
    override = f"reward.name={json.dumps(name)}"
    run_dir = tmp_path / "run"
    assert train(config, run_dir, overrides=(override,), stop_at=15).interrupted
    path = RunDirectory(run_dir).identity
    identity = json.loads(path.read_bytes())
    identity["reward_sha256"] = identity.pop("scored_by")["reward"][file]
    path.write_text(json.dumps(identity))
    change()
    with pytest.raises(ConfigError, match=r"before mine\.py changed"):
        train(config, run_dir, overrides=(override,))
    set_back()
    assert train(config, run_dir, overrides=(override,)).rounds == NUM_ROUNDS
    assert "reward_sha256" not in json.loads(path.read_bytes())


@pytest.mark.parametrize(
    ("judge", "is_warned"), [("diversity", True), ("vader", False)], ids=["the reward", "another"]
)
def test_a_judge_that_is_the_trained_scorer_is_warned_of(
    config: Path, tmp_path: Path, judge: str, is_warned: bool
) -> None:
    listener = Listener()
    overrides = ("reward.name=diversity", f"evaluation.judges=['{judge}']")
    train(config, tmp_path / "run", overrides=overrides, listener=listener, stop_at=1)
    warnings = [text for text in listener.messages if "over-optimization" in text]
    assert len(warnings) == is_warned
    assert all(text.startswith(f"warning: the judge {judge} is") for text in warnings)
