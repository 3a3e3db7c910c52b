from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from quark.cli.console import bar, duration, make_console, number
from quark.cli.run_display import RunDisplay, change, print_next_steps, print_result, round_line
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.training.events import (
    BeforeAfter,
    Progress,
    RoundSummary,
    SampleView,
    TrainingResult,
)
from tests.cli.commands import ROOT, Outcome, quark
from tests.hostile_text import HOSTILE

SGR = re.compile(r"\x1b\[[0-9;]*m")


def sample(text: str, *, quantile: int = 4) -> SampleView:
    return SampleView(id=1, prompt=text, completion=text, reward=0.5, quantile=quantile)


def summary(text: str = "fine", *, round: int = 0) -> RoundSummary:
    return RoundSummary(
        round=round,
        num_rounds=3,
        metrics={
            "reward_mean": 0.61,
            "kl_policy_to_reference": 0.034,
            "distinct_2": 0.9,
            "samples": 2048.0,
        },
        best_samples=[sample(text)],
        worst_samples=[sample(text, quantile=0)],
    )


def result(text: str = "fine") -> TrainingResult:
    return TrainingResult(
        run_dir=Path("runs/demo"),
        pool=Path("runs/demo/pool"),
        model=Path("runs/demo/model"),
        report=Path("runs/demo/report.html"),
        rounds=3,
        samples=3072,
        reward_before=0.54,
        reward_after=0.98,
        kl_policy_to_reference=0.4,
        kl_reference_to_policy=0.3,
        control_curve=[-0.1, 0.4, math.nan, 0.98],
        seconds=61.0,
        interrupted=False,
        metrics={
            "distinct_2_before": 0.94,
            "distinct_2_after": 0.6,
            "vader_before": 0.1,
            "vader_after": 0.7,
            "reward_std_before": 0.3,
        },
        before_after=[
            BeforeAfter(prompt=text, before=text, before_reward=0.1, after=text, after_reward=0.9)
        ],
    )


def display_on(stream: io.StringIO, **options: object) -> RunDisplay:
    return RunDisplay(make_console(stream, width=100), **options)  # type: ignore[arg-type]


def terminal(stream: io.StringIO, width: int = 100) -> Console:
    return Console(
        file=stream, width=width, force_terminal=True, color_system="truecolor", legacy_windows=False,
        markup=False, emoji=False, highlight=False,
    )  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_samples_messages_and_results_cannot_act_on_a_terminal(text: str) -> None:
    stream = io.StringIO()
    console = terminal(stream)
    display = RunDisplay(console)
    display.on_message(text)
    display.on_message(text, level="warning")
    display.on_round(summary(text))
    print_result(console, result(text))
    print_next_steps(console, result(text))
    left = SGR.sub("", stream.getvalue()).replace("\n", "")
    assert left.isprintable()
    if "click" in text:
        assert "\x1b]8" not in stream.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    stream = io.StringIO()
    console = terminal(stream, width)
    display = RunDisplay(console)
    display.on_round(summary("word " * 300))
    print_result(console, result("word " * 300))
    lines = SGR.sub("", stream.getvalue()).splitlines()
    assert max(map(len, lines)) <= width


def test_a_round_names_its_figures_and_shows_best_and_worst_samples() -> None:
    stream = io.StringIO()
    with display_on(stream) as display:
        display.on_round(summary())
    text = stream.getvalue()
    assert "reward 0.610" in text
    assert "KL 0.034" in text
    assert "distinct-2 0.90" in text
    assert "best (4)" in text
    assert "worst (0)" in text


def test_off_terminal_a_silent_phase_gets_a_heartbeat_that_names_it() -> None:
    now = [0.0]
    stream = io.StringIO()
    display = display_on(stream, heartbeat_s=10.0, clock=lambda: now[0])
    display.on_progress(
        Progress(phase="learning", round=2, done=1, total=16, metrics={"loss": 3.25})
    )
    now[0] = 9.0
    assert not display.heartbeat()
    now[0] = 10.0
    assert display.heartbeat()
    assert not display.heartbeat()
    assert stream.getvalue().strip() == "round 2 learning · 1/16 steps · loss 3.25"


def test_time_left_follows_the_phase_and_then_the_rounds() -> None:
    now = [0.0]
    stream = io.StringIO()
    display = display_on(stream, heartbeat_s=0.0, clock=lambda: now[0])
    display.on_progress(Progress(phase="learning", round=0, done=0, total=10))
    now[0] = 20.0
    display.on_progress(Progress(phase="learning", round=0, done=5, total=10))
    assert "20 s left in this phase" in stream.getvalue()
    now[0] = 100.0
    display.on_round(summary())
    display.on_progress(Progress(phase="exploring", round=1, done=0, total=10))
    assert "3:20 min left" in stream.getvalue()
    assert "3:20 min left in" not in stream.getvalue()


def seconds_left(line: str) -> float:
    found = re.search(r"(?:(\d+):)?(\d+) (?:s|min) left", line)
    assert found is not None, line
    return 60.0 * float(found[1] or 0) + float(found[2])


def test_time_left_shrinks_while_nothing_happens() -> None:
    now = [0.0]
    stream = io.StringIO()
    display = display_on(stream, heartbeat_s=0.0, clock=lambda: now[0])
    display.on_progress(Progress(phase="exploring", round=0, done=0, total=10))
    now[0] = 20.0
    display.on_progress(Progress(phase="exploring", round=0, done=5, total=10))
    for moment in (25.0, 30.0, 60.0):
        now[0] = moment
        display.heartbeat()
    lines = [line for line in stream.getvalue().splitlines() if " left" in line]
    assert [seconds_left(line) for line in lines] == [20, 15, 10, 0]


def test_a_round_that_was_resumed_in_its_middle_is_no_measure_of_the_others() -> None:
    now = [0.0]
    stream = io.StringIO()
    display = display_on(stream, heartbeat_s=0.0, clock=lambda: now[0])
    display.on_progress(Progress(phase="learning", round=0, done=9, total=10))
    now[0] = 5.0
    display.on_round(summary())
    display.on_progress(Progress(phase="exploring", round=1, done=0, total=10))
    assert "left" not in stream.getvalue()
    now[0] = 65.0
    display.on_round(summary(round=1))
    display.on_progress(Progress(phase="exploring", round=2, done=0, total=10))
    assert "1:00 min left" in stream.getvalue()


@pytest.mark.parametrize(("text", "mark"), [("", "(empty)"), (" \n", "(blank)")])
def test_a_completion_without_anything_to_see_is_marked(text: str, mark: str) -> None:
    stream = io.StringIO()
    console = make_console(stream, width=100)
    RunDisplay(console).on_round(summary(text))
    assert stream.getvalue().count(mark) == 2
    pair = BeforeAfter(prompt="Pros:", before=text, before_reward=0.1, after=text, after_reward=0.9)
    print_result(console, dataclasses.replace(result(), before_after=[pair]))
    assert stream.getvalue().count(f"Pros: {mark}") == 2


@pytest.mark.parametrize("columns", ["abc", "0", "-5", "", "²", "1e3", "9" * 5000])
def test_a_width_that_is_none_is_not_asked_for(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    shown = quark("config", "list")
    assert shown.code == 0, shown.err
    assert "demo" in shown.out
    assert make_console(io.StringIO()).width == 100


def test_a_width_that_is_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert make_console(io.StringIO()).width == 70


def test_a_run_says_something_before_it_loads_what_takes_long() -> None:
    """What is said first is said before torch is imported."""
    script = (
        "import sys\n"
        "from quark.cli.app import run\n"
        "class Stream:\n"
        "    def __init__(self): self.said = None\n"
        "    def isatty(self): return False\n"
        "    def flush(self): pass\n"
        "    def write(self, text):\n"
        "        if self.said is None and text.strip(): self.said = (text, 'torch' in sys.modules)\n"
        "        return len(text)\n"
        "sys.stderr = stream = Stream()\n"
        "run(['train', 'no-such-preset'])\n"
        "print(stream.said)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.startswith("('loading torch and transformers")
    assert done.stdout.strip().endswith("False)")


def test_off_terminal_there_are_no_escape_sequences() -> None:
    stream = io.StringIO()
    with display_on(stream) as display:
        display.on_progress(Progress(phase="exploring", round=0, done=0, total=4))
        display.on_message("hello")
        display.on_round(summary())
    assert "\x1b" not in stream.getvalue()


def test_on_a_terminal_the_live_line_leaves_nothing_behind() -> None:
    stream = io.StringIO()
    with RunDisplay(terminal(stream)) as display:
        display.on_progress(
            Progress(phase="exploring", round=0, done=1, total=4, metrics={"loss": 1.0})
        )
        display.on_round(summary())
        display.on_progress(Progress(phase="saving", round=0, done=0, total=0))
    assert "exploring" in stream.getvalue() or "saving" in stream.getvalue()
    assert (
        stream.getvalue().endswith(("\x1b[?25h", "\x1b[2K", "\x1b[?25h\n"))
        or "\x1b[?25h" in stream.getvalue()
    )


def test_quiet_shows_warnings_only() -> None:
    stream = io.StringIO()
    with display_on(stream, quiet=True) as display:
        display.on_message("news")
        display.on_progress(Progress(phase="exploring", round=0, done=0, total=4))
        display.on_round(summary())
        display.on_message("beware", level="warning")
    assert stream.getvalue().strip() == "warning: beware"


def test_the_result_shows_every_pair_and_counts_one_round_as_one() -> None:
    stream = io.StringIO()
    pairs = [
        BeforeAfter(prompt=f"p{i}", before="b", before_reward=0.1, after="a", after_reward=0.9)
        for i in range(5)
    ]
    print_result(
        make_console(stream, width=100), dataclasses.replace(result(), before_after=pairs, rounds=1)
    )
    assert all(f"p{i}" in stream.getvalue() for i in range(5))
    assert "1 round," in stream.getvalue()


def test_the_result_shows_before_and_after_and_every_path() -> None:
    stream = io.StringIO()
    console = make_console(stream, width=100)
    print_result(console, result())
    print_next_steps(console, result())
    text = stream.getvalue()
    for expected in (
        "0.540 → 0.980",
        "0.94 → 0.60",
        "judge vader",
        "0.100 → 0.700",
        "quantile 0 (worst)",
        "quantile 3 (best)",
        "runs/demo/pool",
        "runs/demo/model",
        "runs/demo/report.html",
        "quark generate runs/demo --prompt fine",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("name", "before", "after", "style"),
    [
        ("reward_mean", 0.5, 0.9, "green"),
        ("reward_mean", 0.9, 0.5, "red"),
        ("distinct_2", 0.9, 0.6, "red"),
        ("perplexity_reference", 30.0, 20.0, "green"),
        ("completion_length_mean", 9.0, 12.0, ""),
        ("vader", 0.1, 0.7, "green"),
        ("reward_mean", math.nan, 0.7, ""),
        ("reward_mean", 0.7, None, ""),
    ],
)
def test_a_change_has_the_color_of_its_metrics_direction(
    name: str, before: float, after: float | None, style: str
) -> None:
    shown = change(name, before, after, digits=2)
    assert shown.plain == f"{number(before, 2)} → {number(after, 2)}"
    assert {str(span.style) for span in shown.spans} == ({style} if style else set())


def test_numbers_durations_and_bars() -> None:
    assert [number(v) for v in (0.5, math.nan, None, 0.0, 1e-7)] == [
        "0.500",
        "–",
        "–",
        "0.000",
        "1.0e-07",
    ]
    assert [duration(s) for s in (5, 187, 7500, math.nan)] == ["5 s", "3:07 min", "2:05 h", "–"]
    assert bar(0.5, 0.0, 1.0, 10) == "█" * 5
    assert bar(math.nan, 0.0, 1.0, 10) == ""
    assert bar(2.0, 0.0, 1.0, 10) == "█" * 10


def test_a_rounds_line_counts_what_failed_and_was_skipped() -> None:
    assert "skipped" not in round_line(summary())
    metrics = {"failed_scores": 12.0, "skipped_steps": 3.0}
    line = round_line(dataclasses.replace(summary(), metrics=metrics))
    assert line.endswith("12 not scored · 3 steps skipped")


def test_all_places_number_rounds_alike(trained: Outcome, run_dir: Path) -> None:
    begin = next(line for line in trained.err.splitlines() if "2 rounds" in line)
    assert "2 rounds (0 to 1)" in begin
    assert re.findall(r"^round (\d+)/(\d+) ", trained.err, re.MULTILINE) == [("0", "1"), ("1", "1")]
    assert not re.search(r"round \d+ loading", trained.err)
    live = {int(n) for n in re.findall(r"^  round (\d+) \w+", trained.err, re.MULTILINE)}
    assert live <= {0, 1}
    run = RunDirectory(run_dir)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["round"] for row in rows if row["event"] == "round"] == [0, 1]
    assert {row["round"] for row in rows if "round" in row} == {0, 1}
    with NativePool.open(run.pool) as pool:
        assert sorted(set(pool.column("round").tolist())) == [0, 1]
    assert trained.json["rounds"] == 2
    assert "in the pool, 2 rounds" in re.sub(r"<[^>]*>", "", run.report.read_text())
    (listed,) = quark("runs", run_dir, "--json").json["runs"]
    assert (listed["rounds"], listed["num_rounds"]) == (2, 2)
