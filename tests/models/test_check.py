"""A model is tried before a run begins, and refused with the reason or run in the slower way."""

from __future__ import annotations

import json

import pytest
import torch

from quark.errors import ModelError
from quark.models.check.kept import checked
from quark.models.check.results import CheckFinding, ModelCheck
from quark.models.check.trials import check_policy
from quark.models.config import ModelConfig
from quark.models.loading import load_policy
from scripts.model_families import small_model
from tests.models.test_chat_templates import TEMPLATES, chat_tokenizer
from tests.tiny import byte_tokenizer, save_tiny, tiny_llama


def policy_of(folder, model=None, tokenizer=None, **settings):
    save_tiny(folder, model)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    config = ModelConfig(name=str(folder), **settings)
    return config, load_policy(config, num_quantiles=3, seed=0)


def states(check: ModelCheck) -> dict[str, str]:
    return {finding.name: finding.state for finding in check.findings}


@pytest.mark.parametrize("rank", [0, 2])
def test_a_healthy_model_passes_and_stays_as_it_is(rank, tmp_path):
    _, policy = policy_of(tmp_path / "m", tiny_llama(), lora={"rank": rank})
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    check = check_policy(policy)
    assert set(states(check).values()) == {"passed"}
    assert ("saved model with adapters merged" in states(check)) == bool(rank)
    check.require("m")
    assert check.notes == ()
    after = policy.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in policy.model.parameters())
    assert ModelCheck.of_json(json.loads(json.dumps(check.to_json()))) == check


@pytest.mark.parametrize(
    ("family", "slower"),
    [("jamba", set()), ("rwkv", {"padding", "cache"}), ("recurrent_gemma", {"padding", "cache"})],
)
def test_a_model_with_a_way_of_its_own_is_run_in_it(family, slower, tmp_path):
    _, policy = policy_of(tmp_path / "m", small_model(family))
    check = check_policy(policy)
    assert "refused" not in states(check).values()
    found = {name for name, state in states(check).items() if state == "slower"}
    assert found - {"generate()"} == slower
    assert len(check.notes) >= len(slower)


def test_a_chat_template_that_a_reward_token_cannot_steer_is_refused(tmp_path):
    good, bad = chat_tokenizer(TEMPLATES["Qwen 3"]), chat_tokenizer("{{ raise_exception('no') }}")
    _, policy = policy_of(tmp_path / "good", tiny_llama(258), good)
    assert states(check_policy(policy))["steering"] == "passed"
    _, policy = policy_of(tmp_path / "bad", tiny_llama(258), bad)
    with pytest.raises(ModelError, match=r"my-model fails the check 'steering': .*chat template"):
        check_policy(policy).require("my-model")


def test_a_saved_model_that_computes_something_else_is_refused(tmp_path):
    _, policy = policy_of(tmp_path / "m", tiny_llama())
    policy.model.config.rms_norm_eps = 10.0  # its layers have their own
    with pytest.raises(ModelError, match=r"m fails the check 'saved model': .* differs by .* nats"):
        check_policy(policy).require("m")


def test_a_result_is_kept_until_something_that_decides_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config, policy = policy_of(tmp_path / "m", tiny_llama())
    first = checked(config, policy)
    (path,) = (tmp_path / "state" / "quark" / "checks").iterdir()
    record = json.loads(path.read_text())
    marked = record | {"findings": [{"name": "x", "state": "slower", "detail": "kept"}]}
    path.write_text(json.dumps(marked))
    assert checked(config, policy).notes == ("kept",)
    for damage in ("{", "[]", json.dumps(record | {"format_version": 99}), '{"findings": [{}]}'):
        path.write_text(damage)
        assert checked(config, policy) == first
    path.write_text(json.dumps(marked))
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 7
    tokenizer.save_pretrained(tmp_path / "m")
    assert checked(config, policy) == first


def test_a_refusal_names_model_check_and_figure():
    finding = CheckFinding(name="cache", state="refused", detail="differs by 3 nats")
    with pytest.raises(ModelError, match=r"m fails the check 'cache': differs by 3 nats"):
        ModelCheck(findings=(finding,)).require("m")


def test_a_model_that_looks_like_one_that_passed_is_checked_for_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config, policy = policy_of(tmp_path / "m", tiny_llama(seed=1))
    passed = checked(config, policy)
    (kept,) = (tmp_path / "state" / "quark" / "checks").iterdir()
    marked = CheckFinding(name="x", state="slower", detail="kept")
    kept.write_text(json.dumps({"format_version": 1, **ModelCheck(findings=(marked,)).to_json()}))
    assert checked(config, policy).notes == ("kept",)

    # The same files but for the values of the weights.
    weights = tmp_path / "m" / "model.safetensors"
    old = weights.read_bytes()
    weights.unlink()  # the policy's own tensors may lie in it
    weights.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
    assert checked(config, policy) == passed
    weights.write_bytes(old)

    # A file that only looks like the end of one and the beginning of the next.
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    (tmp_path / "m" / f"{names[0]} 1 1\nx\n{names[1]}").write_text("y")
    assert checked(config, policy) == passed

    # A file in a folder of its own.
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    (tmp_path / "m" / "additional_chat_templates" / "a.jinja").write_text("x")
    assert checked(config, policy) == passed
    assert len(list(kept.parent.iterdir())) == 4
