"""What the documents and the help show can be typed: commands, settings, configurations and imports exist."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from quark.cli.app import app
from quark.config.load import load_config
from tests.test_documents import DOCUMENTS, ROOT, name_of

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`(quark [a-z][^`\n]*)`")
NOT_TYPED = ("|", "…", "...", "KEY=VALUE", "NAME=", "[")
"""What only a form of a command has."""
SET = ("overrides", "settings", "set_")
SOURCES = sorted(ROOT.glob("quark/**/*.py"))


def blocks(document: Path, *languages: str) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return [body for language, body in FENCE.findall(text) if language in languages]


def commands_of(line: str) -> Iterator[list[str]]:
    """The arguments of every ``quark`` command in a line of a shell."""
    words = shlex.split(line, comments=True)
    ends = [at for at, word in enumerate(words) if word in ("&&", "|", ">", ";")] + [len(words)]
    begin = 0
    for end in ends:
        part = words[begin:end]
        if "quark" in part:
            yield part[part.index("quark") + 1 :]
        begin = end + 1


def shown_in_blocks() -> list[tuple[str, list[str]]]:
    found = []
    for document in DOCUMENTS:
        for block in blocks(document, "sh", "bash", "console", "text", ""):
            for line in block.replace("\\\n", " ").splitlines():
                typed = line.removeprefix("$ ")
                if re.match(r"quark |(torchrun|accelerate launch) .*-m quark ", typed):
                    found += [(name_of(document), words) for words in commands_of(typed)]
    return found


def shown_in_text() -> list[tuple[str, list[str]]]:
    found = []
    current = [document for document in DOCUMENTS if document.name != "CHANGELOG.md"]
    for file in (*current, *SOURCES):
        for span in SPAN.findall(file.read_text(encoding="utf-8")):
            if not any(part in span for part in NOT_TYPED) and "{" not in span:
                said = re.sub(r"\b(N|ID)\b", "1", span)
                found += [(name_of(file), words) for words in commands_of(said)]
    return found


class Typed:
    """The command line up to the point where a command would run."""

    FORGIVEN = re.compile(r"Missing (argument|option|command)|does not exist|requires an argument")
    """`quark evaluate` and `quark push --checkpoint` are names, and the paths are the reader's."""

    def __init__(self) -> None:
        self._given: dict[str, Any] = {}
        self._command = typer.main.get_command(app)
        self._hold(self._command)

    def _hold(self, command: Any) -> None:
        for one in getattr(command, "commands", {}).values():
            self._hold(one)
        if not hasattr(command, "commands"):
            command.callback = self._take

    def _take(self, **given: Any) -> None:
        self._given = given

    def problem(self, arguments: list[str]) -> str:
        """What is wrong with them; nothing if they can be typed."""
        self._given = {}
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the help of a group
                self._command.main(list(arguments), prog_name="quark", standalone_mode=False)
            overrides = next((self._given[name] for name in SET if self._given.get(name)), None)
            if overrides:
                load_config("demo", overrides)
        except Exception as error:
            text = str(getattr(error, "format_message", error.__str__)())
            if text and not self.FORGIVEN.search(text):
                return f"quark {shlex.join(arguments)}: {text}"
        return ""


@pytest.fixture(scope="module")
def typed() -> Typed:
    return Typed()


@pytest.mark.parametrize("shown", [shown_in_blocks, shown_in_text])
def test_commands_that_are_shown_can_be_typed(
    typed: Typed, shown: Callable[[], list[tuple[str, list[str]]]]
) -> None:
    found = shown()
    assert len(found) > 60
    problems = [
        f"{where}: {problem}" for where, words in found if (problem := typed.problem(words))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "arguments", ["pool head runs/my --no-such", "pool heat", "train --set run.rounds=1"]
)
def test_commands_that_cannot_be_typed_are_found(typed: Typed, arguments: str) -> None:
    assert typed.problem(arguments.split())


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_configurations_that_are_shown_load(document: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(document, "toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(block, encoding="utf-8")
        load_config(path, [])


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_names_that_code_imports_exist(document: Path) -> None:
    for block in blocks(document, "python", "py"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                if importlib.util.find_spec(module.split(".")[0]) is None:
                    continue  # a tool that is not installed here
                if not module.startswith("quark"):
                    continue
                for alias in node.names:
                    assert hasattr(importlib.import_module(module), alias.name), alias.name
