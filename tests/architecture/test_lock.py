"""The environment of the gate is what the lock says, and the lock is what pyproject.toml allows."""

from __future__ import annotations

import re

from scripts import lock


def test_the_lock_satisfies_pyproject() -> None:
    assert lock.unsatisfied() == []


def test_every_package_of_the_lock_has_hashes_and_no_address() -> None:
    for file in lock.LOCKS.glob("*.txt"):
        text = file.read_text(encoding="utf-8")
        assert "://" not in text
        for package in re.split(r"\n(?=\S)", text):
            if not package.startswith("#"):
                assert "--hash=sha256:" in package, package.splitlines()[0]


def test_packages_without_torch_and_its_cuda_build_stand_apart() -> None:
    environment = (lock.LOCKS / "environment.txt").read_text(encoding="utf-8")
    assert not re.search(r"^(torch|triton|nvidia-|cuda-)", environment, re.MULTILINE)
    assert "torch" in {package.name for package in lock.locked()}


def test_a_changed_lock_makes_another_environment() -> None:
    makefile = (lock.ROOT / "Makefile").read_text(encoding="utf-8")
    key = next(line for line in makefile.splitlines() if line.startswith("KEY :="))
    assert "pyproject.toml" in key
    assert "locks/*.txt" in key
