from __future__ import annotations

import errno
import inspect
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import quark.errors
from quark.cli.app import run
from quark.cli.exit_codes import MEANINGS, ExitCode, exit_code_of, way_out_of
from quark.errors import (
    ConfigError,
    PoolCorruptedError,
    PoolError,
    PoolLockedError,
    PoolPoisonedError,
    PoolVersionError,
    QuarkError,
    RunDirectoryError,
)

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def errors() -> list[type[QuarkError]]:
    return [
        kind
        for _, kind in inspect.getmembers(quark.errors, inspect.isclass)
        if issubclass(kind, QuarkError)
    ]


@pytest.mark.parametrize("kind", errors())
def test_every_error_of_ours_has_an_exit_code_of_its_own_kind(kind: type[QuarkError]) -> None:
    assert exit_code_of(kind("x")) in (ExitCode.USAGE, ExitCode.INPUT, ExitCode.STATE)


def test_the_kinds_lead_to_the_documented_codes() -> None:
    assert exit_code_of(ConfigError()) == 2
    assert exit_code_of(PoolCorruptedError()) == 4
    assert exit_code_of(RunDirectoryError()) == 4
    assert exit_code_of(FileNotFoundError(2, "no", "f")) == 3
    assert exit_code_of(OSError(errno.ENOSPC, "full", "f")) == 4
    assert exit_code_of(PermissionError(13, "no", "f")) == 4
    assert exit_code_of(OSError(errno.ENAMETOOLONG, "too long", "f")) == 4
    assert exit_code_of(OSError("of nothing on disk")) == 1
    assert exit_code_of(KeyboardInterrupt()) == 130
    assert exit_code_of(ZeroDivisionError()) == 1


def test_only_what_is_damaged_is_to_be_verified() -> None:
    assert "verify" in str(way_out_of(PoolCorruptedError()))
    for error in (PoolVersionError(), PoolPoisonedError(), PoolLockedError(), PoolError()):
        assert "verify" not in str(way_out_of(error))


def test_help_and_docs_list_every_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    docs = DOCS.read_text(encoding="utf-8")
    for code, meaning in MEANINGS.items():
        assert f"{code.value} {meaning}" in text
        assert f"| {code.value} |" in docs


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["train", "--no-such-option"],
        ["train", "--resume", "--fresh"],
        ["train", "--force"],
        ["generate", "x"],
        ["pool", "head", "x", "--num", "0"],
        ["init", "--preset"],
    ],
    ids=" ".join,
)
def test_wrong_usage_leaves_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_an_expected_error_is_one_line_with_a_way_out_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(tmp_path)]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "is not a run directory" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_a_traceback_is_shown_on_request(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "variable":
        monkeypatch.setenv("QUARK_TRACEBACK", "1")
    flags = ["--traceback"] if how == "flag" else []
    assert run([*flags, "report", str(tmp_path)]) == 4
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert "error: " in captured.err


def test_an_unexpected_error_leaves_with_1_and_hides_local_variables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        token = "-".join(("canary", "5f1c"))  # noqa: F841 - it is there not to be shown
        raise ZeroDivisionError("a \x1b[2J hostile message")

    monkeypatch.setattr("quark.report.render.write_report", broken)
    assert run(["report", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert "ZeroDivisionError" in captured.err
    assert "\x1b" not in captured.err
    assert "canary-5f1c" not in captured.err


def test_hostile_names_in_errors_cannot_act(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(tmp_path / "a\x1b[2J\u202eb")]) == 4
    assert r"a\x1b[2J\u202eb" in capsys.readouterr().err.replace("\n", "")


STOPPING = """
import os, signal, sys, time
from quark.cli.stopping import StopOnSignal
asked = []
with StopOnSignal(lambda text: print("saying", text, flush=True)) as signals:
    if "late" not in sys.argv:
        signals.ask_through(lambda: asked.append(1))
    print("ready", flush=True)
    while len(asked) < 1 and "late" not in sys.argv:
        time.sleep(0.01)
    if "late" in sys.argv:
        time.sleep(1.0)
        signals.ask_through(lambda: asked.append(1))
    print("asked", len(asked), flush=True)
    if "stay" in sys.argv:
        time.sleep(60)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("mode", ["now", "late", "stay"])
def test_the_first_signal_asks_and_the_second_leaves_at_once(
    number: signal.Signals, mode: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING, mode],
        stdout=subprocess.PIPE,
        text=True,
        cwd=DOCS.parents[1],
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert "again quits at once" in process.stdout.readline()
        assert process.stdout.readline() == "asked 1\n"
        if mode == "stay":
            process.send_signal(number)
            started = time.monotonic()
            assert process.wait(timeout=10) == 130
            assert time.monotonic() - started < 5
        else:
            assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
