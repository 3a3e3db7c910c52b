"""Build the documents as a site, and fail at any broken link: `make docs`, or `python scripts/build_site.py OUT`.

The pages keep their places in the tree, so that their links hold on the site and in a checkout alike. Files that a page
links to come along.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "docs/**/*.md", "examples/*.md", "benches/*.md", "quark_pool_rs/*.md")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "target" / "site")
    out = parser.parse_args().out.absolute()
    with tempfile.TemporaryDirectory() as folder:
        gather(Path(folder))
        code = build(Path(folder), out)
    if code:
        sys.exit(code)
    print(f"{out}: read it with python -m http.server --bind 127.0.0.1 --directory {out}")


def gather(into: Path) -> None:
    """Copy the pages, and the files that they link to, to the same places in ``into``."""
    wanted = {page for pattern in PAGES for page in ROOT.glob(pattern)}
    todo = list(wanted)
    while todo:
        page = todo.pop()
        if page.suffix != ".md":
            continue
        for target in _LINK.findall(page.read_text(encoding="utf-8")):
            file = (page.parent / target).resolve()
            if file.is_file() and file.is_relative_to(ROOT) and file not in wanted:
                wanted.add(file)
                todo.append(file)
    for file in wanted:
        copy = into / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def build(pages: Path, out: Path) -> int:
    """The status of mkdocs, which is 1 if a page of ``pages`` has a broken link or anchor."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "mkdocs.yml"
        config.write_text(f"{text}docs_dir: {pages}\nsite_dir: {out}\n", encoding="utf-8")
        # With --quiet, mkdocs would not count the warnings that --strict is about.
        return subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config],
            env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
            check=False,
        ).returncode


if __name__ == "__main__":
    main()
