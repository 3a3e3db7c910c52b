from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from quark.errors import ModelError
from quark.models.config import ModelConfig
from quark.models.gguf_header import check_gguf
from quark.models.loading import load_base_model

gguf = pytest.importorskip("gguf")


def write(path: Path, *, layers: int = 1) -> Path:
    """A GGUF file with the parts that a model has, of 2 tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(32)
    writer.add_string("general.note", "x" * 100)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_whole_file_is_sound_and_each_cut_of_it_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    check_gguf(path)
    content = path.read_bytes()
    end = content.index(b"output_norm.weight") + 64  # beyond the header; the rest is tensors
    for length in (*range(0, end, 7), len(content) - 40):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"a\.gguf is not a whole GGUF file: .*again"):
            check_gguf(path)


@pytest.mark.parametrize("number", [1 << 31, 1 << 60, (1 << 64) - 1])
def test_a_huge_number_anywhere_in_the_header_is_no_trap(tmp_path: Path, number: int) -> None:
    content = write(tmp_path / "a.gguf").read_bytes()
    path = tmp_path / "changed.gguf"
    end = content.index(b"output_norm.weight") + 50
    num_refused = 0
    for place in range(8, end):
        path.write_bytes(content[:place] + struct.pack("<Q", number) + content[place + 8 :])
        try:
            check_gguf(path)
        except ModelError:
            num_refused += 1
    assert num_refused > 100


def test_more_layers_than_tensors_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", layers=1_000_000_000)
    with pytest.raises(ModelError, match=r"llama\.block_count is 1,000,000,000"):
        check_gguf(path)


def test_a_model_that_is_cut_is_named_when_it_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:-40])
    config = ModelConfig(name=str(path), cache_dir=tmp_path / "cache")
    with pytest.raises(ModelError, match=r"its tensors take .* bytes, and it has"):
        load_base_model(config)
    assert not (tmp_path / "cache").exists()
