"""Rewards that are the user's own code."""

import hashlib
import shutil
import sys
from pathlib import Path

import pytest

from quark.errors import RewardError
from quark.rewards.build import build_reward, reward_content, reward_provenance
from quark.rewards.callable import CallableReward
from quark.rewards.config import RewardConfig
from quark.rewards.source_files import source_files

SOURCE = """
from dataclasses import dataclass

def length(*, prompts, completions):
    return [float(len(text)) for text in completions]

def positional(prompts, completions, scale=2.0):
    return [scale for _ in completions]

def trl_style(completions, **kwargs):
    return [float(len(kwargs["prompts"]))] * len(completions)

def no_prompts(completions):
    return []

@dataclass
class Stateful:
    name: str = "mine"
    calls: int = 0

    def __call__(self, *, prompts, completions):
        self.calls += 1
        return [self.calls] * len(completions)

class Nested:
    @staticmethod
    def deep(prompts, completions):
        return [0.0] * len(completions)

class Broken:
    def __init__(self):
        raise OSError("no disk")

constant = 3
_private = length
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def called(reference):
    return list(CallableReward(reference)(prompts=["p", "q"], completions=["a", "bcd"]))


def test_a_function_of_a_file_is_called_with_both(file):
    assert called(f"{file}:length") == [1.0, 3.0]
    assert called(f"{file}:positional") == [2.0, 2.0]
    assert called(f"{file}:trl_style") == [2.0, 2.0]
    assert called(f"{file}:Nested.deep") == [0.0, 0.0]


def test_a_class_is_made_once_and_keeps_its_state(file):
    reward = CallableReward(f"{file}:Stateful")
    assert reward.name == "mine"
    assert list(reward(prompts=[""], completions=["x"])) == [1]
    assert list(reward(prompts=[""], completions=["x"])) == [2]


def test_the_file_and_its_hash_are_recorded(file):
    reward = build_reward(RewardConfig(name=f"{file}:length"))
    assert reward.name == "length"
    assert reward_provenance(reward) == {
        "name": "length",
        "reference": f"{file}:length",
        "path": str(file.resolve()),
        "sha256": hashlib.sha256(SOURCE.encode()).hexdigest(),
    }


def test_a_module_is_imported_from_where_python_looks(file, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    reward = CallableReward("my_rewards:length")
    assert reward.path == file.resolve()
    sys.modules.pop("my_rewards")


def test_the_current_folder_is_not_searched_in_secret(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    before = list(sys.path)
    with pytest.raises(RewardError, match=r"\./my_rewards\.py:function"):
        CallableReward("my_rewards:length")
    assert called("./my_rewards.py:length") == [1.0, 3.0]
    assert sys.path == before


def test_two_files_of_one_name_stay_apart(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "r.py").write_text(
            f"def f(prompts, completions):\n    return [{number}] * len(completions)\n"
        )
    first, second = (CallableReward(f"{tmp_path}/{number}/r.py:f") for number in (1, 2))
    assert list(first(prompts=[""], completions=[""])) == [1]
    assert list(second(prompts=[""], completions=[""])) == [2]


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("lenght", "it offers: .*Stateful.*length"),
        ("constant", "is int, not a function"),
        ("no_prompts", r"cannot be called as function\(prompts=\.\.\., completions=\.\.\.\)"),
        ("Broken", "no disk"),
    ],
)
def test_what_is_no_reward_is_named(file, attribute, message):
    with pytest.raises(RewardError, match=message):
        CallableReward(f"{file}:{attribute}")


def test_a_file_that_fails_is_named(tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(RewardError, match=r"bad\.py: ZeroDivisionError"):
        CallableReward(f"{tmp_path}/bad.py:f")
    with pytest.raises(RewardError, match=r"none\.py is not a file"):
        CallableReward(f"{tmp_path}/none.py:f")
    with pytest.raises(RewardError, match="cannot import 'no_such_module'"):
        CallableReward("no_such_module:f")


@pytest.mark.parametrize("reference", ["", ":", "module:", ":function", "module"])
def test_a_reference_needs_both_parts(reference):
    with pytest.raises(RewardError, match="is not module:function"):
        CallableReward(reference)


def test_modules_of_its_folder_belong_to_it_and_installed_ones_do_not(tmp_path, monkeypatch):
    package = tmp_path / "scales"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("import scales.deepest\nfrom ..outside import nothing\n")
    (package / "deepest.py").write_text("this is not python\n")
    (tmp_path / "beside.py").write_text("import numpy\n")
    (tmp_path / "unused.py").write_text("")
    file = tmp_path / "mine.py"
    file.write_text(
        "import json, numpy.linalg, quark.errors\n"
        "def f(prompts, completions):\n    import beside\n    from scales import inner\n    import no_such_module\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["beside.py", "scales/__init__.py", "scales/deepest.py", "scales/inner.py"]
    reward = build_reward(RewardConfig(name=f"{file}:f"))
    assert sorted(reward_provenance(reward)["files"]) == names
    assert sorted(reward_content(reward)) == sorted([*names, "mine.py"])
    assert source_files(file) == [file.resolve(), *(tmp_path.resolve() / name for name in names)]


def test_a_file_beside_it_that_python_does_not_find_is_not_its_own(tmp_path):
    (tmp_path / "json.py").write_text("")
    (tmp_path / "beside.py").write_text("")
    file = tmp_path / "mine.py"
    file.write_text("import json\ntry:\n    import beside\nexcept ImportError:\n    pass\n")
    assert source_files(file) == [file.resolve()]


def test_a_module_among_the_installed_ones_does_not_own_its_neighbours():
    assert [file.name for file in source_files(Path(shutil.__file__))] == ["shutil.py"]
