"""A stranger's model folder is data: it reaches no network, no other file and no code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quark.errors import ModelError, RewardError, UnsafeFileError
from quark.models.config import ModelConfig
from quark.models.loading import load_base_model, load_saved_policy, load_tokenizer
from quark.rewards.classifier import ClassifierConfig, ClassifierReward
from tests.planted import PLANTS, Plant, recorded
from tests.tiny import save_tiny, tiny_policy

Edit = Callable[[Path], None]


def set_in(file: str, **values: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / file
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**known, **values}))

    return edit


def custom_generation(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    proof = folder.parent / "it-ran"
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(proof)!r}, 'w')\n")


def no_own_config(folder: Path) -> None:
    set_in("adapter_config.json", base_model_name_or_path="stranger/base", peft_type="LORA")(folder)
    (folder / "config.json").unlink()


def load(folder: Path) -> None:
    load_tokenizer(ModelConfig(name=str(folder)))
    load_base_model(ModelConfig(name=str(folder)))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (set_in("config.json", attn_implementation="stranger/kernel"), "code on the Hub"),
        (set_in("config.json", _attn_implementation="stranger/kernel@v1:f"), "code on the Hub"),
        (set_in("config.json", attn_implementation="paged|stranger/kernel"), "code on the Hub"),
        (set_in("config.json", attn_implementation={"text": "a/b"}), "code on the Hub"),
        (set_in("config.json", text_config={"attn_implementation": "a/b"}), "code on the Hub"),
        (set_in("config.json", experts_implementation="stranger/kernel"), "code on the Hub"),
        (
            set_in("config.json", model_type="own", auto_map={"AutoConfig": "stranger/x--c.C"}),
            "needs code of its own repository",
        ),
        (
            set_in("adapter_config.json", base_model_name_or_path="stranger/base"),
            "holds an adapter",
        ),
        (no_own_config, "it has no config.json"),
    ],
)
def test_a_folder_that_needs_more_than_itself_is_refused(
    tmp_path: Path, edit: Edit, reason: str
) -> None:
    folder = save_tiny(tmp_path / "model")
    edit(folder)
    with recorded() as reached, pytest.raises(ModelError, match=reason):
        load(folder)
    assert reached.network == reached.processes == []


@pytest.mark.parametrize(
    "edit",
    [
        set_in("config.json", auto_map={"AutoModelForCausalLM": "stranger/x--m.M"}),
        set_in("config.json", _name_or_path="stranger/x", name_or_path="stranger/x"),
        set_in("tokenizer_config.json", auto_map={"AutoTokenizer": ["stranger/x--t.T", None]}),
        set_in("tokenizer_config.json", name_or_path="stranger/x", gguf_file="../private.txt"),
        set_in("tokenizer_config.json", **dict.fromkeys(("tokenizer_file", "vocab_file", "merges_file"), "../private.txt")),
        set_in("generation_config.json", custom_generate="stranger/x", penalty_alpha=0.5),
        custom_generation,
    ],
)  # fmt: skip
def test_what_a_folder_wishes_for_is_not_fetched(tmp_path: Path, edit: Edit) -> None:
    (tmp_path / "private.txt").write_text("a private line\n")
    folder = save_tiny(tmp_path / "model")
    edit(folder)
    # A version of the library may find that it cannot load the folder then.
    with recorded() as reached, contextlib.suppress(ModelError):
        load(folder)
    assert reached.network == reached.processes == []
    outside = {path for path in reached.files if path.is_relative_to(tmp_path)}
    assert all(path.is_relative_to(folder) for path in outside)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "extra"]
)
def test_links_and_pipes_in_a_folder_are_refused(tmp_path: Path, plant: Plant, file: str) -> None:
    folder = tmp_path / "model"
    tiny_policy().save(folder)
    plant(folder / file)
    with pytest.raises((UnsafeFileError, ModelError)):
        load(folder)
    with pytest.raises(UnsafeFileError, match=file):
        load_saved_policy(folder)
    with pytest.raises((UnsafeFileError, RewardError)):
        ClassifierReward(ClassifierConfig(model=str(folder)))


def test_a_snapshot_in_the_hubs_cache_loads(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "rev"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    save_tiny(snapshot)
    for number, file in enumerate(list(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    load(snapshot)
