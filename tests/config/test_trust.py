"""What a configuration reaches, and what a user has allowed."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from quark.config.grants import Grants, require
from quark.config.load import load_config, preset_names
from quark.config.reach import Kind, Reach, reaches
from quark.config.schema import RunConfig
from quark.errors import ConfigError
from quark.training.factories import make_rewards

SERVER: dict[str, Any] = {"url": "https://host/score", "api_key_env": "AWS_SECRET_ACCESS_KEY"}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def of(run: Path, **sections: dict[str, Any]) -> set[tuple[str, str, str]]:
    found = reaches(RunConfig.model_validate(sections), run)
    return {(reach.key, reach.kind.name, reach.thing) for reach in found}


def test_what_ships_with_quark_reaches_nothing(run: Path) -> None:
    for name in ("sentiment", "toxicity", "vader", "diversity", "length", "regex"):
        assert of(run, reward={"name": name, "http": SERVER}) == set()
    assert of(run) == set()
    assert reaches(load_config("demo").config, run) == ()


def test_every_preset_names_what_it_reaches(run: Path) -> None:
    for name in preset_names():
        config = load_config(name).config
        is_embedded = config.model.name.startswith("embedded:")
        named = {reach.key for reach in reaches(config, run)}
        assert ("model.name" in named) == (not is_embedded)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"reward": {"name": "http", "http": SERVER}},
            {
                ("reward.http.url", "NETWORK", "https://host/score"),
                ("reward.http.api_key_env", "VARIABLE", "$AWS_SECRET_ACCESS_KEY"),
            },
        ),
        (
            {"evaluation": {"judges": ["http"]}, "reward": {"http": SERVER}},
            {
                ("reward.http.url", "NETWORK", "https://host/score"),
                ("reward.http.api_key_env", "VARIABLE", "$AWS_SECRET_ACCESS_KEY"),
            },
        ),
        (
            {"pool": {"extra_scores": ["os:getcwd"]}},
            {("pool.extra_scores", "CODE", "os:getcwd")},
        ),
        (
            {"prompts": {"source": "/a/../b.txt", "evaluation_source": "/c.txt"}},
            {
                ("prompts.source", "FILE", "/b.txt"),
                ("prompts.evaluation_source", "FILE", "/c.txt"),
            },
        ),
        ({"model": {"name": "org/model"}}, {("model.name", "NETWORK", "hub:org/model")}),
        ({"model": {"name": "gpt2", "revision": "x"}}, {("model.name", "NETWORK", "hub:gpt2@x")}),
        ({"model": {"name": "package:json"}}, {("model.name", "FILE", "package:json")}),
        (
            {"model": {"name": "/m/a.gguf", "cache_dir": "/etc"}},
            {("model.name", "FILE", "/m/a.gguf"), ("model.cache_dir", "FILE", "/etc")},
        ),
        (
            {"reward": {"name": "classifier", "classifier": {"model": "org/c", "revision": "1"}}},
            {("reward.classifier.model", "NETWORK", "hub:org/c@1")},
        ),
        ({"pool": {"extra_scores": ["hub:f"]}}, {("pool.extra_scores", "CODE", "module hub:f")}),
        (
            {"pool": {"extra_scores": ["https://host/score"]}},
            {("pool.extra_scores", "CODE", "module https://host/score")},
        ),
        ({"reward": {"name": "/scorers/mine"}}, {("reward.name", "FILE", "/scorers/mine")}),
        ({"reward": {"name": "/r.py:score"}}, {("reward.name", "CODE", "/r.py:score")}),
        (
            {"sampling": {"backend": "http", "http": {**SERVER, "reload_url": "http://host/load"}}},
            {
                ("sampling.http.url", "NETWORK", "https://host/score"),
                ("sampling.http.reload_url", "NETWORK", "http://host/load"),
                ("sampling.http.api_key_env", "VARIABLE", "$AWS_SECRET_ACCESS_KEY"),
            },
        ),
        (
            {"tracking": {"trackers": ["wandb", "tensorboard", "trackio"]}},
            {
                ("tracking.trackers", "NETWORK", "wandb"),
                ("tracking.trackers", "NETWORK", "trackio"),
            },
        ),
    ],
)
def test_everything_beyond_the_run_is_named_exactly(
    run: Path, sections: dict[str, Any], expected: set[tuple[str, str, str]]
) -> None:
    assert of(run, **sections) == expected


def test_data_in_the_run_is_its_own_but_for_links_and_code(run: Path, tmp_path: Path) -> None:
    (run / "prompts.txt").write_text("a\n")
    (run / "reward.py").write_text("")
    assert of(run, prompts={"source": str(run / "prompts.txt")}) == set()
    [code] = of(run, reward={"name": f"{run}/reward.py:f"})
    assert code[1] == "CODE"
    (tmp_path / "private.txt").write_text("b\n")
    (run / "linked.txt").symlink_to(tmp_path / "private.txt")
    [linked] = of(run, prompts={"source": str(run / "linked.txt")})
    assert linked == ("prompts.source", "FILE", str(tmp_path / "private.txt"))


def test_finding_the_file_of_a_module_runs_nothing_of_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "planted_package"
    package.mkdir()
    proof = tmp_path / "it-ran"
    (package / "__init__.py").write_text(f"open({str(proof)!r}, 'w')\n")
    (package / "inner.py").write_text("one\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = RunConfig.model_validate({"reward": {"name": "planted_package.inner:f"}})
    [before] = reaches(config, run)
    (package / "inner.py").write_text("two\n")
    [after] = reaches(config, run)
    assert not proof.exists()
    assert (before.kind, before.thing) == (Kind.CODE, "planted_package.inner:f")
    assert None is not before.sha256 != after.sha256 is not None


def asks(found: list[Reach] | tuple[Reach, ...], run: Path, **options: Any) -> bool:
    try:
        require(found, run, **options)
    except ConfigError:
        return True
    return False


def test_the_question_names_every_thing_and_the_options(run: Path) -> None:
    config = RunConfig.model_validate({"reward": {"name": "http", "http": SERVER}})
    with pytest.raises(ConfigError) as error:
        require(reaches(config, run), run)
    text = str(error.value)
    assert "reward.http.url: network https://host/score\n" in text
    assert "reward.http.api_key_env: environment variable $AWS_SECRET_ACCESS_KEY\n" in text
    assert "--allow https://host/score --allow '$AWS_SECRET_ACCESS_KEY'" in text


def test_a_grant_is_for_one_thing_of_one_setting_in_one_run(run: Path, state: Path) -> None:
    def network(thing: str, key: str = "reward.http.url") -> list[Reach]:
        return [Reach(kind=Kind.NETWORK, key=key, thing=thing, said=thing)]

    found = network("https://host/score")
    assert asks(found, run, allowed=["https://host/", "https://host"])
    assert not asks(found, run, allowed=["https://host/score"])
    assert not asks(found, run), "a grant is remembered"
    assert asks(network("https://host/score2"), run)
    assert asks(network("https://host/score", "sampling.http.url"), run)
    moved = shutil.move(run, run.with_name("moved"))
    assert asks(found, Path(moved))
    [file] = (state / "quark" / "grants").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    shutil.move(moved, run)
    file.write_bytes(b"{}")
    assert asks(found, run), "a record that says something else is none"


def test_an_option_that_names_the_same_allows_it_this_once(run: Path) -> None:
    config = RunConfig.model_validate({"reward": {"name": "/r.py:score"}})
    assert not asks(reaches(config, run), run, named=[("reward.name", "/r.py:score")])
    assert asks(reaches(config, run), run, named=[("model.name", "/r.py:score")])
    assert asks(reaches(config, run), run)


def test_code_is_asked_for_again_when_its_file_changes(run: Path, tmp_path: Path) -> None:
    code = tmp_path / "reward.py"
    code.write_text("one\n")
    config = RunConfig.model_validate({"reward": {"name": f"{code}:f"}})
    Grants(run).remember(reaches(config, run))
    assert not asks(reaches(config, run), run)
    code.write_text("two\n")
    assert asks(reaches(config, run), run)


def test_code_is_asked_for_again_when_something_that_it_imports_changes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    code, helper, added = folder / "reward.py", folder / "helper.py", folder / "added.py"
    code.write_text("import helper\ntry:\n    import added\nexcept ImportError:\n    pass\n")
    helper.write_text("one\n")
    monkeypatch.syspath_prepend(folder)
    config = RunConfig.model_validate({"reward": {"name": f"{code}:f"}})
    Grants(run).remember(reaches(config, run))
    assert not asks(reaches(config, run), run)
    helper.write_text("two\n")
    with pytest.raises(ConfigError) as error:
        require(reaches(config, run), run)
    text = str(error.value)
    assert f", which imports {helper}. Changed since you allowed it: {helper}\n" in text
    assert f"add: --allow {code}:f" in text
    assert not asks(reaches(config, run), run, allowed=[f"{code}:f"])
    assert not asks(reaches(config, run), run)
    added.write_text("")
    with pytest.raises(ConfigError, match=f"Changed since you allowed it: {added}\n"):
        require(reaches(config, run), run)


def test_a_module_of_a_package_is_asked_for_again_when_its_package_changes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "granted_package" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text("")
    (inner.parent / "scales.py").write_text("one\n")
    (inner / "__init__.py").write_text("")
    (inner / "rewards.py").write_text("from ..scales import scale\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = RunConfig.model_validate({"reward": {"name": "granted_package.inner.rewards:f"}})
    for changed in (
        inner.parent / "scales.py",
        inner / "__init__.py",
        inner.parent / "__init__.py",
    ):
        Grants(run).remember(reaches(config, run))
        assert not asks(reaches(config, run), run)
        changed.write_text("import os\n")
        assert asks(reaches(config, run), run), changed


def test_code_that_cannot_be_parsed_imports_nothing_that_is_known(
    run: Path, tmp_path: Path
) -> None:
    code = tmp_path / "reward.py"
    for source in ("x" + ".a" * 400_000, "-" * 400_000 + "1", "(" * 1000, "\0", "x\n" * 600_000):
        code.write_text(source)
        [reach] = reaches(RunConfig.model_validate({"reward": {"name": f"{code}:f"}}), run)
        assert reach.sha256 is not None
        assert reach.imports == ()


@pytest.mark.parametrize("home", ["unwritable", "missing"])
def test_without_a_place_for_grants_it_asks_each_time(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    if home == "unwritable":
        (tmp_path / "state").write_text("a file where the folder should be")
    else:
        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setattr(Path, "home", _no_home)
    config = RunConfig.model_validate({"prompts": {"source": "/x.txt"}})
    for _ in range(2):
        assert not asks(reaches(config, run), run, allowed=["/x.txt"])
        assert asks(reaches(config, run), run)


def _no_home() -> Path:
    raise RuntimeError("no home")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("reward", {"strange.py:member"}),
        ("evaluation", {"strange.py:gold"}),
        ("pool", {"strange.py:gold", "strange.py:extra"}),
    ],
)
def test_members_and_gold_of_a_run_are_asked_about_where_they_are_called(
    run: Path, section: str, expected: set[str]
) -> None:
    settings = (
        "reward.name=ensemble",
        'reward.members=["vader", "strange.py:member"]',
        "pool.gold=strange.py:gold",
        'pool.extra_scores=["strange.py:extra"]',
    )
    reached = reaches(load_config(None, settings).config, run, sections=(section,))
    assert {one.said for one in reached if one.kind is Kind.CODE} == expected


def test_a_measurement_does_not_run_code_that_only_exploration_needs(tmp_path: Path) -> None:
    planted, trace = tmp_path / "planted.py", tmp_path / "it-ran"
    planted.write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "def score(*, prompts, completions):\n    return [0.0] * len(completions)\n"
    )
    settings = (f'pool.extra_scores=["{planted}:score"]', "pool.gold=vader")
    config = load_config(None, settings).config
    rewards = make_rewards(config, explores=False)
    assert not trace.exists()
    assert (dict(rewards.extra_columns), set(rewards.judges)) == ({}, {"gold"})
    assert set(make_rewards(config).extra_columns) == {
        "gold",
        f"{planted}_score".replace("/", "_")[-64:],
    }
    assert trace.exists()
