from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from quark.config.load import choices, preset_names, to_toml
from quark.config.schema import RunConfig

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def fields_of(section: type[BaseModel], name: str) -> dict[str, FieldInfo]:
    fields: dict[str, FieldInfo] = {}
    for key, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields |= fields_of(kind, f"{name}.{key}" if name else key)
        else:
            fields[f"{name}.{key}"] = field
    return fields


def rows() -> dict[str, tuple[str, str]]:
    """By key: the column of the default, and the rest."""
    found: dict[str, tuple[str, str]] = {}
    section = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"### `\[([\w.]+)\]`", line):
            section = heading[1]
        elif section and (key := re.match(r"\| `(\w+)` \| (.*?) \| (.*) \|$", line)):
            found[f"{section}.{key[1]}"] = (key[2], key[3])
    return found


def test_the_page_lists_every_key_and_no_other() -> None:
    assert rows().keys() == fields_of(RunConfig, "").keys()


def test_the_page_says_every_default() -> None:
    for key, field in fields_of(RunConfig, "").items():
        said = rows()[key][0].strip("`")
        if key == "sampling.http.reload_body":
            assert said == "vLLM's"
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        assert (
            said == "unset"
            if default is None
            else tomllib.loads(f"x = {said}")["x"]
            == (list(default) if isinstance(default, tuple) else default)
        ), key


def test_the_page_and_a_new_file_name_every_word_that_a_key_can_be() -> None:
    text = to_toml(RunConfig(), comments=True)
    several = {
        key: words
        for key, f in fields_of(RunConfig, "").items()
        if (words := choices(f.annotation))
    }
    assert several["pool.ties"] == ("hash", "older_first", "together")
    assert several["run.parallel"] == ("data", "sharded")
    assert "tracking.trackers" in several
    for key, words in several.items():
        default, explanation = rows()[key]
        for word in words:
            assert f"`{word}`" in explanation or (word == "auto" and default == '`"auto"`'), (
                key,
                word,
            )
        assert f" of: {', '.join(words)}.\n" in text


@pytest.mark.parametrize("name", preset_names())
def test_the_page_names_every_preset(name: str) -> None:
    assert f"| `{name}` |" in PAGE.read_text(encoding="utf-8")
