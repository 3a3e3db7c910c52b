"""The documents: their examples run, their links lead somewhere, and their lines are short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from quark.config.schema import RunConfig

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
FENCED = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
FOLDERS = (
    "",
    "docs/",
    "docs/methods/",
    "benches/",
    "examples/",
    "quark_pool_rs/",
    "quark/assets/*/",
    "quark/assets/*/*/",
)
DOCUMENTS = sorted(file for folder in FOLDERS for file in ROOT.glob(f"{folder}*.md"))
LONGEST_LINE = 120


def test_the_pool_guide_runs_as_it_stands(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "pool.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 4
    script = tmp_path / "guide.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert printed.startswith("range(0, 4)\nrange(0, 4)\n[1 1 1] [0.1 0.4 0.9]\n[ 2  0  1 -1]\n")
    assert " lasts" in printed
    assert "[('reward', 1, 4)]\nNone ()\n" in printed
    assert "[(2, ' is is', 0.4" in printed
    assert "\n4\n4\n[4, 0]\n" in printed
    # What the comments behind calls say is printed, each up to its explanation, in their order.
    said = re.findall(r"\)  # ((?:[\d(\[]|True|None|range).*)", "\n".join(blocks))
    told = [re.split(r"[:;]|\.\.\.|, [a-z]", comment)[0] for comment in said]
    assert len(told) >= 20
    rest = printed
    for words in told:
        assert words in rest, f"{words!r} is not printed, or not there"
        rest = rest.split(words, 1)[1]


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    text = FENCED.sub("", document.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def long_lines(text: str) -> list[str]:
    """The lines that are too long, but for tables, code blocks and links that stand alone."""
    lines = FENCED.sub("", text).splitlines()
    return [
        line
        for line in lines
        if len(line) > LONGEST_LINE
        and not line.startswith(("|", "    "))
        and not re.fullmatch(r"\s*(- )?!?\[[^\]]*\]\([^)]*\)", line)
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_relative_links_lead_somewhere(document: Path) -> None:
    for target, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        file = document.parent / target if target else document
        assert file.exists(), f"{name_of(document)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(document)} links to {target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_lines_are_short(document: Path) -> None:
    assert long_lines(document.read_text(encoding="utf-8")) == []


def test_long_lines_are_found_outside_of_tables_code_and_links() -> None:
    long = "word " * 30
    assert long_lines(f"{long}\n- {long}\n") == [long, f"- {long}"]
    assert long_lines(f"| {long} |\n```sh\n{long}\n```\n    {long}\n[{long}](x.md)\n") == []


def test_a_page_begins_with_a_heading_and_a_sentence() -> None:
    for document in [*ROOT.glob("docs/*.md"), ROOT / "benches" / "README.md"]:
        heading, empty, sentence, *_ = document.read_text(encoding="utf-8").splitlines()
        assert heading.startswith("# "), name_of(document)
        assert not empty, name_of(document)
        assert re.match(r"[A-Za-z]", sentence), name_of(document)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_settings_that_are_named_exist(document: Path) -> None:
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    named = re.findall(r"`(\w+)\.(\w+)`", document.read_text(encoding="utf-8"))
    for section, key in named:
        if section in sections and key not in ("json", "safetensors"):  # files of that name
            assert key in sections[section].model_fields, f"{name_of(document)}: {section}.{key}"


def test_the_python_guide_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 8
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {"__name__": "guide"})
    printed = capsys.readouterr().out
    assert re.match(r"\d+\.\d -> \d+\.\d characters\n\[0\]\n", printed)
    assert "\nrange(0, 2)\n" in printed
    assert "report.html" in printed
    assert (tmp_path / "runs" / "own" / "given").is_dir()
