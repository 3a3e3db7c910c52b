"""The documents' Python examples run, in order, and print what their comments say they do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from quark.config.schema import RunConfig

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benches/*.md")])


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_settings_that_are_named_exist(document: Path) -> None:
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    named = re.findall(r"`(\w+)\.(\w+)`", document.read_text(encoding="utf-8"))
    for section, key in named:
        if section in sections and key not in ("json", "safetensors"):  # files of that name
            assert key in sections[section].model_fields, f"{document.name}: {section}.{key}"
