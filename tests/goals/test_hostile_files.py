"""Files that somebody else wrote: they load, or end in an error of ours. Never in anything else."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quark.config.load import load_config, to_toml
from quark.data.prompts import PromptConfig, load_prompts
from quark.errors import CheckpointError, ConfigError, DataError
from quark.training.state.checkpoint import Checkpoints, verify
from tests.tiny import byte_tokenizer
from tests.training.states import run_state

quickly = settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([2**63, -(2**64), 1e999]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with some of it replaced by other bytes."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(result)))
        end = min(len(result), start + draw(st.integers(0, 12)))
        result[start:end] = draw(
            st.one_of(st.binary(max_size=12), st.sampled_from([b"nan", b"1e999", b"[" * 3000]))
        )
    return bytes(result)


CONFIG = to_toml(load_config("demo").config, comments=False).encode()


@quickly
@given(content=st.one_of(st.binary(max_size=200), changed(CONFIG)))
def test_a_configuration_loads_or_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.toml"
    path.write_bytes(content)
    with suppress(ConfigError):
        load_config(path)


ROWS = (
    b'{"prompt": "one", "split": "train"}\n{"prompt": {"text": "two"}}\n{"prompt": "three"}\n' * 3
)


@quickly
@given(
    content=st.one_of(st.binary(max_size=200), changed(ROWS)),
    suffix=st.sampled_from(["jsonl", "txt"]),
)
def test_prompts_load_or_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"any.{suffix}"
    path.write_bytes(content)
    config = PromptConfig.model_validate({"source": str(path), "num_evaluation": 1})
    with suppress(DataError):
        load_prompts(config, byte_tokenizer(), seed=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    moments = {"weight/exp_avg": torch.ones(2, 2)}
    return Checkpoints(folder, keep_last=2).save(
        run_state(7), weights={"weight": torch.eye(2)}, optimizer=moments
    )


@quickly
@given(data=st.data())
def test_a_checkpoint_verifies_or_is_refused(
    checkpoint: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """With sums that match, as somebody who wants to do harm would see to."""
    path = tmp_path / checkpoint.name
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(checkpoint, path)
    name = data.draw(st.sampled_from(sorted(file.name for file in path.iterdir())))
    whole = (path / name).read_bytes()
    if name == "state.json" and data.draw(st.booleans()):
        state = json.loads(whole) | {
            data.draw(
                st.sampled_from(
                    ["step", "format_version", "position", "alerts", "pool", "fingerprint"]
                )
            ): data.draw(JSON)
        }
        content = json.dumps(state).encode()
    else:
        content = data.draw(changed(whole))
    (path / name).write_bytes(content)
    if name != "manifest.json":
        manifest = json.loads((path / "manifest.json").read_bytes())
        digest = hashlib.sha256(content).hexdigest()
        manifest[name] = {"bytes": len(content), "sha256": digest}
        (path / "manifest.json").write_text(json.dumps(manifest))
    with suppress(CheckpointError):
        assert isinstance(verify(path).step, int)
