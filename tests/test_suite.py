"""The suite itself: a test that fails is reported and ends the run with an error, whatever its text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_tests(folder: Path, text: str, *, hooks: str = "") -> subprocess.CompletedProcess[str]:
    """The outcome of a file of tests on two processes, with the hooks of this suite."""
    (folder / "test_it.py").write_text(text, encoding="utf-8")
    (folder / "conftest.py").write_text(f"from tests.conftest import *\n{hooks}", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "2",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [*command, "--rootdir", str(folder), f"--basetemp={folder / 'temporary'}", str(folder)],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_failure_whose_text_cannot_be_encoded_is_reported(tmp_path: Path) -> None:
    done = run_tests(
        tmp_path,
        "def test_odd():\n    assert 'a\\udc80' == 'b'\n\n\ndef test_even():\n    pass\n",
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert r"a\udc80" in done.stdout
    assert "INTERNALERROR" not in done.stdout


@pytest.mark.slow
def test_an_internal_error_of_a_worker_is_an_error(tmp_path: Path) -> None:
    done = run_tests(
        tmp_path,
        "def test_fine():\n    pass\n",
        hooks="def pytest_runtest_makereport():\n    raise OSError('worker failed')\n",
    )
    assert done.returncode != 0, done.stdout + done.stderr
    assert "worker failed" in done.stdout
