"""``quark selftest``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from quark.cli.selftest import selftest
from quark.selftest import durability
from quark.selftest.base import Check
from tests.cli.commands import ROOT, quark, quark_process


def test_a_process_of_its_own_says_what_it_did(tmp_path: Path) -> None:
    outcome = quark_process(
        "selftest", "--durability", "--dir", tmp_path, "--trials", "2", "--json"
    )
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert report["passed"] is True
    assert report["directory"] == str(tmp_path)
    assert {check["name"]: check["passed"] for check in report["checks"]} == dict.fromkeys(
        ("disk", "second_writer", "kill", "damage"), True
    )
    assert report["checks"][2]["trials"] == 2
    assert report["checks"][3]["trials"] > 1000
    assert set(report["append_s"]) == {"median", "p95", "max"}
    row = next(
        line
        for line in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `selftest` | ")
    )
    fields = re.sub(r"\([^)]*\)", "", row.split(" | ")[1])
    assert set(re.findall(r"`(\w+)`", fields)) == set(report)
    assert "testing that" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_shown_and_told_by_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(folder: Path) -> Check:
        problems = tuple(f"lost sample {i}\x1b[2J" for i in range(12))
        return Check(name="second_writer", num_trials=12, detail="tried", problems=problems)

    def passed(name: str) -> Check:
        return Check(name=name, num_trials=1, detail="tried", problems=())

    monkeypatch.setattr(durability, "check_second_writer", failed)
    monkeypatch.setattr(durability, "check_kills", lambda *_, **__: passed("kill"))
    monkeypatch.setattr(durability, "check_damage", lambda *_, **__: passed("damage"))
    people = quark("selftest", "--durability", "--dir", tmp_path)
    assert people.code == 4
    assert "a promise was broken" in people.out
    assert "lost sample 9" in people.out
    assert "lost sample 10" not in people.out
    assert "and 2 more" in people.out
    assert "\x1b" not in people.out
    plain = quark("selftest", "--durability", "--dir", tmp_path, "--json")
    assert plain.code == 4
    assert plain.json["passed"] is False
    assert len(plain.json["checks"][1]["problems"]) == 12


def test_a_disk_that_refuses_is_a_failed_check_and_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> Check:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(durability, "check_disk", refuse)
    monkeypatch.setattr(durability, "check_kills", lambda *_, **__: refuse(tmp_path))
    monkeypatch.setattr(durability, "check_damage", lambda *_, **__: refuse(tmp_path))
    outcome = quark("selftest", "--durability", "--dir", tmp_path, "--json")
    assert outcome.code == 4
    assert "not supported" in outcome.json["checks"][0]["problems"][0]
    assert outcome.json["append_s"] is None
    assert quark("selftest", "--durability", "--dir", tmp_path).code == 4


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "--durability"),
        (["--durability", "--trials", "0"], 2, "trials"),
        (["--durability", "--dir", "/no/such/folder"], 3, "/no/such/folder"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], code: int, says: str) -> None:
    outcome = quark("selftest", *arguments)
    assert outcome.code == code
    assert says in outcome.err


def test_the_help_says_the_library_s_numbers() -> None:
    assert inspect.signature(selftest).parameters["trials"].default == durability.NUM_KILLS
    assert str(durability.NUM_FLIPPED_BYTES) in quark("selftest", "--help").out
