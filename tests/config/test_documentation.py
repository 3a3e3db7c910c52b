from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from quark.config.load import preset_names
from quark.config.schema import RunConfig

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def keys_of(section: type[BaseModel], name: str) -> set[str]:
    keys: set[str] = set()
    for key, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys |= keys_of(kind, f"{name}.{key}" if name else key)
        else:
            keys.add(f"{name}.{key}")
    return keys


def test_the_page_lists_every_key_and_no_other() -> None:
    listed: set[str] = set()
    section = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"### `\[([\w.]+)\]`", line):
            section = heading[1]
        elif section and (key := re.match(r"\| `(\w+)` \|", line)):
            listed.add(f"{section}.{key[1]}")
    assert listed == keys_of(RunConfig, "")


@pytest.mark.parametrize("name", preset_names())
def test_the_page_names_every_preset(name: str) -> None:
    assert f"| `{name}` |" in PAGE.read_text(encoding="utf-8")
