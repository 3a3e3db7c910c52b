"""A run directory is entered and cleared: what quark left there goes, and nothing of the user's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import quark
from quark.config.load import load_config
from quark.errors import ModelError
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.run_identity import RunIdentity
from quark.training.state import entry
from quark.training.state.exactness import Exactness
from tests.api.small import PROMPTS, SMALL
from tests.models.test_chat_templates import chat_tokenizer
from tests.tiny import save_tiny, tiny_llama


class Silent:
    def on_message(self, text: str, *, level: str = "info") -> None: ...


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    entry.record(run, load_config("demo"), RunIdentity(run_id="old", quark_version="0"))
    NativePool.create(run.pool, vocab_size=5).close()
    for name in ("config.toml", "run.json", "held_out.jsonl", "metrics.jsonl"):
        (run.path / f"{name}.partial").write_text("by an older release")
    return run


def names(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.path.iterdir())


def enter(run: RunDirectory, *, fresh: bool) -> RunIdentity:
    listener = Silent()
    exactness = Exactness(is_required=False, listener=listener)  # type: ignore[arg-type]
    loaded = load_config("demo")
    return entry.enter(run, loaded, listener, exactness, fresh=fresh, force=fresh)  # type: ignore[arg-type]


def test_left_overs_of_older_releases_go_when_a_run_resumes(run: RunDirectory) -> None:
    (run.path / "notes.partial").write_text("mine")
    assert enter(run, fresh=False).run_id == "old"
    assert names(run) == ["config.toml", "notes.partial", "pool", "run.json"]


def test_a_run_that_makes_way_takes_only_its_own_along(run: RunDirectory) -> None:
    for folder in ("model", "model.previous", "model.partial-0123abcd", "model.photos"):
        (run.path / folder).mkdir()
    for name in ("metrics.jsonl", "held_out.jsonl.partial-0123abcd", "model.png", "model.pt"):
        (run.path / name).write_text("")
    identity = enter(run, fresh=True)
    assert (run.path / "model.previous").exists()
    entry.clear(run, load_config("demo"), identity)
    assert names(run) == ["config.toml", "model.photos", "model.png", "model.pt", "run.json"]
    assert RunIdentity.read(run).run_id == identity.run_id


@pytest.mark.parametrize("is_given", [False, True], ids=["named", "given"])
def test_a_start_with_a_model_that_is_refused_leaves_nothing(
    tmp_path: Path, *, is_given: bool
) -> None:
    model, tokenizer = tiny_llama(258), chat_tokenizer("{{ raise_exception('no') }}")
    save_tiny(tmp_path / "model", model)
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "runs" / "run"
    with pytest.raises(ModelError, match="fails the check 'steering'"):
        quark.train(
            None,
            model=(model, tokenizer) if is_given else tmp_path / "model",
            prompts=PROMPTS,
            reward="length",
            run_dir=path,
            **SMALL,
        )
    assert not path.exists()


def test_only_what_a_new_run_wrote_is_taken_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    identity = enter(run, fresh=False)
    entry.leave(run, replace(identity, run_id="another process"), keeps_folder=False)
    assert names(run) == ["config.toml", "run.json"]
    (run.path / "notes").write_text("mine")
    entry.leave(run, identity, keeps_folder=False)
    assert names(run) == ["config.toml", "notes", "run.json"]
    (run.path / "notes").unlink()
    entry.leave(run, identity, keeps_folder=True)
    assert names(run) == []
    entry.leave(run, enter(run, fresh=False), keeps_folder=False)
    assert not run.path.exists()
