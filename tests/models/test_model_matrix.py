"""The table of families says what was tried: nothing that failed late counts as refused, and no family is left out."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quark.errors import ModelError
from scripts.model_families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("model_matrix")


def test_only_a_start_that_was_refused_counts_as_refused(matrix: ModuleType) -> None:
    def fails_with(error: Exception) -> str:
        def run() -> None:
            raise error

        return str(matrix._tried(run))

    assert fails_with(matrix.RefusedError("no")) == "refused: no"
    assert fails_with(ModelError("too late")) == "FAILS: ModelError: too late"


@pytest.mark.slow
def test_a_family_is_tried_as_a_whole(matrix: ModuleType, tmp_path: Path) -> None:
    row = matrix.try_family("llama", tmp_path)
    assert (row.plain, row.adapters, row.chat) == ("yes", "yes", "yes")
    assert (tmp_path / "lora" / "model" / "model.safetensors").is_file()


def test_a_family_that_is_refused_says_why(matrix: ModuleType, tmp_path: Path) -> None:
    row = matrix.try_family("xlstm", tmp_path)
    assert row.plain.startswith("refused: ") or row.plain.startswith("not built: ")
    assert not (tmp_path / "plain").exists()


def test_the_table_counts_every_column(matrix: ModuleType) -> None:
    def row(family: str, **cells: Any) -> Any:
        there = {"plain": "yes", "adapters": "yes", "chat": "yes", "padding": "", "cache": ""}
        return matrix.Row(family=family, **(there | cells), seconds=1.0)

    rows = [row("a"), row("b", adapters="FAILS: no"), row("c", plain="not built: KeyError: 'c'")]
    count, more, *lines = matrix.table(rows)
    assert count.startswith("1 of 2 families")
    assert more.startswith("1 more")
    assert [line.split(" | ")[0] for line in lines[3:]] == ["| a", "| b", "| c"]


def test_every_family_has_a_row() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    text = page.partition("<!-- begin: model matrix -->")[2].partition("<!-- end")[0]
    assert set(re.findall(r"^\| ([a-z][\w-]*) \|", text, re.MULTILINE)) - {"family"} == set(
        FAMILIES
    )
    assert "FAILS" not in text
