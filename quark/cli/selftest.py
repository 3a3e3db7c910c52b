"""``quark selftest``: test quark's guarantees on this machine."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quark.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from quark.selftest.disk import Latency
    from quark.selftest.durability import DurabilityReport

_TITLES = {
    "disk": "the disk has what a pool needs",
    "second_writer": "a second writer is refused",
    "kill": "kill -9 takes nothing acknowledged",
    "damage": "damage is refused, never read",
}
_SHOWN_PROBLEMS = 10
_SAY_SOMETHING_S = 10.0


def selftest(
    durability: Annotated[
        bool, typer.Option("--durability", help="Test whether this disk keeps a pool's guarantees.")
    ] = False,
    directory: Annotated[
        Path, typer.Option("--dir", help="A folder on the disk to test.", show_default=False)
    ] = Path(),
    trials: Annotated[int, typer.Option("--trials", "-n", min=1, help="Writers to kill.")] = 25,
    thorough: Annotated[
        bool,
        typer.Option(
            "--thorough", help="Damage every byte of a pool instead of 1000; takes minutes."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Test quark's guarantees on this machine and disk.

    `--durability` kills writers of a pool at random moments, damages a pool's files byte by byte, lets
    a second writer try, and measures how long a durable append takes. All in a new folder under `--dir`
    (the current one by default) that is removed afterwards. Exits with status 4 if anything failed.

    **Example:**  `quark selftest --durability --dir /data/runs`
    """
    if not durability:
        raise typer.BadParameter("say what to test: --durability")
    from quark.cli.console import make_console, print_json
    from quark.selftest.durability import NUM_FLIPPED_BYTES, examine

    report = examine(
        directory,
        num_kills=trials,
        num_flipped_bytes=None if thorough else NUM_FLIPPED_BYTES,
        on_progress=_progress_lines(make_console(sys.stderr)),
    )
    if as_json:
        print_json(_plain(report))
    else:
        _show(report)
    if not report.is_passed:
        raise typer.Exit(ExitCode.STATE)


def _progress_lines(console: Console) -> Callable[[str, int, int], None]:
    """Print a line when a check begins, and then one every ten seconds."""
    from quark.cli.console import count, prose

    last_s = time.monotonic()

    def on_progress(name: str, done: int, total: int) -> None:
        nonlocal last_s
        if total and time.monotonic() - last_s < _SAY_SOMETHING_S:
            return
        last_s = time.monotonic()
        far = f": {count(done)} of {count(total)}" if total else ""
        console.print(prose(f"testing that {_TITLES[name]}{far}", "dim"))

    return on_progress


def _plain(report: DurabilityReport) -> dict[str, Any]:
    return {
        "passed": report.is_passed,
        "directory": report.folder.resolve(),
        "file_system": dataclasses.asdict(report.file_system),
        "checks": [
            {
                "name": check.name,
                "passed": check.is_passed,
                "trials": check.num_trials,
                "detail": check.detail,
                "problems": check.problems,
            }
            for check in report.checks
        ],
        "sync_s": None if report.sync is None else dataclasses.asdict(report.sync),
        "append_s": None if report.append is None else dataclasses.asdict(report.append),
        "warnings": report.warnings,
        "seconds": report.seconds,
    }


def _show(report: DurabilityReport) -> None:
    from quark.cli.console import duration, figures, foreign, grid, make_console, prose

    console = make_console()
    table = grid("check", "", "what was done", wide=(2,))
    table.columns[2].overflow = "fold"
    table.columns[2].no_wrap = False
    for check in report.checks:
        outcome = prose("ok", "green") if check.is_passed else prose("failed", "bold red")
        table.add_row(prose(_TITLES[check.name]), outcome, prose(check.detail))
    console.print(table)
    console.print()
    kind, mount_point = report.file_system.kind, report.file_system.mount_point
    where = "not known here" if kind is None else f"{kind} at {mount_point}"
    rows: list[tuple[str, Text | str]] = [("file system", foreign(where))]
    for name, latency in (("durable append", report.append), ("sync of a page", report.sync)):
        if latency is not None:
            rows.append((name, _milliseconds(latency)))
    console.print(figures(rows))
    for warning in report.warnings:
        console.print(prose(f"warning: {warning}", "yellow"), soft_wrap=True)
    for check in report.checks:
        for problem in check.problems[:_SHOWN_PROBLEMS]:
            line = foreign(f"{check.name}: {problem}", style="red")
            console.print(line, soft_wrap=True)
        if (more := len(check.problems) - _SHOWN_PROBLEMS) > 0:
            console.print(prose(f"{check.name}: and {more} more (--json lists them)", "red"))
    verdict = "every promise was kept" if report.is_passed else "a promise was broken"
    style = "green" if report.is_passed else "bold red"
    console.print(prose(f"{verdict}, in {duration(report.seconds)}", style))


def _milliseconds(latency: Latency) -> str:
    return (
        f"{latency.median * 1e3:.2f} ms (95% within {latency.p95 * 1e3:.2f} ms, "
        f"longest {latency.max * 1e3:.2f} ms)"
    )
