"""The documents as a site: every page has a place, no link is broken, and reading it needs no network."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from scripts import build_site

ROOT = build_site.ROOT


def test_every_page_of_the_documents_has_a_place_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": (\S+\.md)$", menu, re.MULTILINE))
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages <= named
    assert all((ROOT / page).is_file() for page in named)


def test_pages_come_with_what_they_link_to(tmp_path: Path) -> None:
    build_site.gather(tmp_path)
    assert (tmp_path / "docs" / "pool.md").is_file()
    assert (tmp_path / "examples" / "train_with_a_lambda.py").is_file()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs-material is not installed"
)
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pages, site = tmp_path / "pages", tmp_path / "site"
    build_site.gather(pages)
    assert build_site.build(pages, site) == 0
    built = list(site.rglob("*.html"))
    assert len(built) > 20
    for page in built:
        loaded = re.findall(r'(?:src|<link[^>]*href)="(https?:[^"]*)"', page.read_text("utf-8"))
        assert loaded == [], page
    with (pages / "docs" / "cli.md").open("a") as page:
        page.write("[broken](pool.md#nowhere)\n")
    assert build_site.build(pages, site) == 1
