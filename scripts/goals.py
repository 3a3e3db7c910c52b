"""Measure the reliability goals: run each row's harness at its size, print what was reached, keep it as JSON.

    python scripts/goals.py                 # every row, at the size of a gate
    python scripts/goals.py --rows 1,2,4    # some of them
    python scripts/goals.py --rows 2 --soak # at the size of a release

What a row means, and what was reached when: docs/reliability.md. The status is 1 where a row failed.
The same harnesses run in every test run at sizes of seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a row's harness counted."""

    counts: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One promise, and how it is tried.

    ``gate`` and ``soak`` are what must be reached, by count; a name that ends in ``_s`` or ``_blocks`` is a
    most, any other a least.
    """

    number: int
    promise: str
    gate: Mapping[str, float]
    soak: Mapping[str, float]
    measure: Callable[[Mapping[str, float], Path], Outcome]


def cargo_test(
    sizes: Callable[[Mapping[str, float]], Mapping[str, float]], *tests: str
) -> Callable[[Mapping[str, float], Path], Outcome]:
    """Tests in Rust that take their sizes from the environment and print counts."""

    def measure(goal: Mapping[str, float], _folder: Path) -> Outcome:
        environment = {name: str(int(size)) for name, size in sizes(goal).items()}
        return counted(_cargo(tests, environment))

    return measure


def _cargo(tests: tuple[str, ...], environment: Mapping[str, str]) -> tuple[int, str]:
    command = ["cargo", "test", "--release", "-p", "quark_pool_rs"]
    command += [part for test in tests for part in ("--test", test)]
    command += ["--", "--nocapture"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def counted(done: tuple[int, str]) -> Outcome:
    """The lines ``goal ROW name=count ...`` of an output, summed by name."""
    status, output = done
    counts: Counter[str] = Counter()
    for line in re.findall(r"^goal \d+ (.*)$", output, re.MULTILINE):
        for name, count in re.findall(r"(\w+)=(\d+)", line):
            counts[name] += int(count)
    failed = re.findall(r"^test (\S+) .*FAILED$", output, re.MULTILINE)
    panics = re.findall(r"panicked at .*\n.*", output)
    failures = [*failed, *panics] if status else []
    if status and not failures:
        failures = [output[-500:]]
    return Outcome(counts=dict(counts), failures=failures)


def kills(goal: Mapping[str, float], folder: Path) -> Outcome:
    from quark.selftest.writers import check_kills

    done = 0

    def count(number: int, total: int) -> None:
        nonlocal done
        done = number
        if number % 1000 == 0:
            print(f"  {number:,} of {total:,} kills", flush=True)

    # So that a disk does not fill: pools of a thousand kills are compared, and removed.
    failures: list[str] = []
    chance = random.Random()
    num_acknowledged = 0
    target = int(goal["kills"])
    for start in range(0, target, 1000):
        part = folder / f"kills-{start}"
        part.mkdir()
        check = check_kills(
            part,
            num_trials=min(1000, target - start),
            longest_wait_s=0.02,
            chance=chance,
            on_trial=lambda number, _, start=start: count(start + number, target),  # type: ignore[misc]
        )
        failures += check.problems
        acknowledged = re.search(r"([\d,]+) commits", check.detail)
        num_acknowledged += int(acknowledged[1].replace(",", "")) if acknowledged else 0
        if not check.problems:
            shutil.rmtree(part)
    return Outcome(counts={"kills": done, "acknowledged": num_acknowledged}, failures=failures)


NUM_READERS = 4


def readers(goal: Mapping[str, float], folder: Path) -> Outcome:
    from tests.goals.readers import watch

    begin = time.monotonic()
    seen = watch(folder, num_readers=NUM_READERS, seconds=goal["seconds"])
    counts: dict[str, float] = {
        "readers": NUM_READERS,
        "seconds": round(time.monotonic() - begin),
        "generations": seen.num_generations,
        "snapshots_read": seen.num_snapshots,
        "times_moved_on": seen.num_distinct,
        "snapshots_given_up": seen.num_lost,
    }
    return Outcome(counts=counts, failures=seen.problems)


def deaths(goal: Mapping[str, float], folder: Path) -> Outcome:
    from tests.goals.dead_writers import kill_holders

    found = kill_holders(folder, num_deaths=int(goal["deaths"]))
    counts = {
        "deaths": found.num_deaths,
        "while_appending": found.num_while_appending,
        "readers": found.num_readers,
        "longest_s": round(found.longest_s, 4),
    }
    return Outcome(counts=counts, failures=found.problems)


def resumed(goal: Mapping[str, float], _folder: Path) -> Outcome:
    command = [sys.executable, "scripts/kill_trials.py", "--trials", str(int(goal["trials"]))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    equal = re.search(r"(\d+) of (\d+) runs.*?; (\d+) of them", done.stdout)
    if equal is None:
        return Outcome(failures=[done.stderr[-500:]])
    counts: dict[str, float] = {
        "trials": int(equal[2]),
        "equal": int(equal[1]),
        "killed_twice": int(equal[3]),
    }
    return Outcome(counts=counts, failures=[] if done.returncode == 0 else [done.stdout[-500:]])


def signals(goal: Mapping[str, float], folder: Path) -> Outcome:
    # In a process of its own, as it forks: nothing may have begun a thread.
    command = [sys.executable, "-m", "tests.goals.signals", str(folder), str(int(goal["signals"]))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return Outcome(failures=[done.stderr[-500:]])
    found = json.loads(done.stdout.splitlines()[-1])
    failures = found.pop("problems")
    counts = {name.removeprefix("num_"): count for name, count in found.items()}
    return Outcome(counts=counts, failures=failures)


def opened(goal: Mapping[str, float], folder: Path) -> Outcome:
    from tests.goals.crashed_pool import open_after_crash

    found = open_after_crash(folder, num_samples=int(goal["rows"]))
    counts = {
        "rows": found.num_samples,
        "reader_s": round(found.reader_s, 4),
        "writer_s": round(found.writer_s, 4),
    }
    return Outcome(counts=counts)


def pytest_cases(*selection: str) -> Callable[[Mapping[str, float], Path], Outcome]:
    """Tests in Python, counted by case."""

    def measure(_goal: Mapping[str, float], folder: Path) -> Outcome:
        report = folder / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *selection]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.exists():
            return Outcome(failures=[done.stdout[-500:]])
        cases = ElementTree.parse(report).getroot().findall(".//testcase")
        failed = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in cases
            if case.find("failure") is not None or case.find("error") is not None
        ]
        skipped = sum(case.find("skipped") is not None for case in cases)
        return Outcome(counts={"cases": len(cases) - skipped}, failures=failed)

    return measure


def exercised(_goal: Mapping[str, float], folder: Path) -> Outcome:
    """Line coverage of the pool by its own tests, and its ``unsafe``.

    The tools must be of an LLVM that reads what the compiler writes: 19 or newer. ``LLVM_BIN`` says where.
    """
    sources = sorted((ROOT / "quark_pool_rs" / "src").rglob("*.rs"))
    code = [line for path in sources for line in path.read_text("utf-8").splitlines()]
    unsafe = sum(bool(re.match(r"[^/]*\bunsafe\b\s*(\{|impl|fn)", line)) for line in code)
    outcome = Outcome(counts={"unsafe_blocks": unsafe})
    tools = os.environ.get("LLVM_BIN")
    profdata, cov = (shutil.which(f"llvm-{name}", path=tools) for name in ("profdata", "cov"))
    if profdata is None or cov is None:
        outcome.failures.append("llvm-profdata and llvm-cov are not there: set LLVM_BIN")
        return outcome
    target = Path(os.environ.get("QUARK_GOAL_COVERAGE_TARGET", ROOT / "target" / "coverage"))
    environment = os.environ | {
        "RUSTFLAGS": "-Cinstrument-coverage",
        "LLVM_PROFILE_FILE": str(folder / "build-%p-%m.profraw"),
        "CARGO_TARGET_DIR": str(target),
    }
    # The power-cut test does not end in reasonable time without optimization.
    command = ["cargo", "test", "--release", "-p", "quark_pool_rs", "--tests"]
    command += ["--message-format=json"]
    done = subprocess.run(
        [*command, "--no-run"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    built = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    programs = [item["executable"] for item in built if item.get("executable")]
    # Each with its own counts: what one program leaves out, its compiler describes in another way, and
    # merged counts of such a function are dropped.
    reached: dict[tuple[str, int], bool] = {}
    for number, program in enumerate(programs):
        profile = {"LLVM_PROFILE_FILE": str(folder / f"program-{number}-%p.profraw")}
        ran = subprocess.run(
            [program],
            cwd=ROOT / "quark_pool_rs",
            env=environment | profile,
            capture_output=True,
            check=False,
        )
        if ran.returncode:
            outcome.failures.append(f"{program} failed")
        merged = folder / f"{number}.profdata"
        profiles = folder.glob(f"program-{number}-*.profraw")
        subprocess.run([profdata, "merge", "-sparse", *profiles, "-o", merged], check=True)
        export = subprocess.run(
            [cov, "export", "-format=lcov", f"-instr-profile={merged}", program, *sources],
            capture_output=True,
            text=True,
            check=True,
        )
        file = ""
        for line in export.stdout.splitlines():
            kind, _, rest = line.partition(":")
            if kind == "SF":
                file = rest
            elif kind == "DA":
                at, count = rest.split(",")[:2]
                place = file, int(at)
                reached[place] = reached.get(place, False) or int(count) > 0
    outcome.counts["line_percent"] = round(100 * sum(reached.values()) / max(1, len(reached)), 2)
    outcome.counts["lines"] = len(reached)
    return outcome


ROWS = [
    Row(
        number=1,
        promise="A commit that returned survives the death of the process",
        gate={"kills": 2_000},
        soak={"kills": 50_000},
        measure=kills,
    ),
    Row(
        number=2,
        promise="... and a power cut at any instant, also during recovery",
        gate={"images": 200_000, "mutants": 10},
        soak={"images": 20_000_000, "mutants": 10},
        measure=cargo_test(lambda goal: {"QUARK_GOAL_IMAGES": goal["images"]}, "power_cut"),
    ),
    Row(
        number=3,
        promise="Commits are all-or-nothing; readers see only whole snapshots",
        gate={"seconds": 60, "snapshots_read": 1000, "times_moved_on": 1000},
        soak={"seconds": 900, "snapshots_read": 15_000, "times_moved_on": 15_000},
        measure=readers,
    ),
    Row(
        number=4,
        promise="Any changed or missing byte is reported, never served",
        gate={"mutants": 2_088_960},
        soak={"mutants": 2_088_960, "random": 10_000_000},
        measure=cargo_test(
            lambda goal: {
                "QUARK_GOAL_MASKS": 255,
                "QUARK_GOAL_RANDOM_DAMAGES": goal.get("random", 20_000),
            },
            "corruption",
        ),
    ),
    Row(
        number=5,
        promise="Disk full or failing: an error, nothing acknowledged is lost, no failed sync is trusted",
        gate={"runs": 42_000},
        soak={"runs": 1_000_000},
        measure=cargo_test(
            lambda goal: {
                "QUARK_GOAL_FAULTS": 6,
                "QUARK_GOAL_HISTORIES": goal["runs"] / 1_700,
            },
            "io_errors",
        ),
    ),
    Row(
        number=6,
        promise="A hostile file gives an error: no crash, at most 64 MB and 1 s",
        gate={"targets": 8, "seconds": 240},
        soak={"targets": 8, "seconds": 4_800},
        measure=cargo_test(lambda goal: {"QUARK_GOAL_FUZZ_SECONDS": goal["seconds"] / 8}, "fuzz"),
    ),
    Row(
        number=7,
        promise="No lock to clean up after a crash",
        gate={"deaths": 1_000, "longest_s": 1.0},
        soak={"deaths": 10_000, "longest_s": 1.0},
        measure=deaths,
    ),
    Row(
        number=8,
        promise="Killed training resumes to byte-identical weights",
        gate={"trials": 100, "equal": 100},
        soak={"trials": 1_500, "equal": 1_500, "killed_twice": 300},
        measure=resumed,
    ),
    Row(
        number=9,
        promise="SIGTERM loses no step",
        gate={"signals": 50},
        soak={"signals": 500},
        measure=signals,
    ),
    Row(
        number=10,
        promise="A damaged newest checkpoint falls back to the one before",
        gate={"cases": 12},
        soak={"cases": 12},
        measure=pytest_cases("tests/training/test_resume.py", "-k", "damaged"),
    ),
    Row(
        number=11,
        promise="Never fewer than 2 verified checkpoints; never deletes what is not its own",
        gate={"cases": 8},
        soak={"cases": 8},
        measure=pytest_cases(
            "tests/training/test_checkpoint.py",
            "tests/training/test_resume.py",
            "-k",
            "test_checkpoint or old_checkpoints or not_ours or only_what_is_ours or killed_checkpoint",
        ),
    ),
    Row(
        number=12,
        promise="A bad reward function or prompt row stops with its name and position",
        gate={"cases": 95},
        soak={"cases": 95},
        measure=pytest_cases(
            "tests/rewards/test_scoring.py",
            "tests/rewards/test_time_limit.py",
            "tests/training/test_failing_rewards.py",
            "tests/data/test_prompts.py",
        ),
    ),
    Row(
        number=13,
        promise="A non-finite loss or gradient never reaches weights or checkpoint",
        gate={"cases": 1},
        soak={"cases": 1},
        measure=pytest_cases("tests/training/test_guards.py", "-k", "finite or skipped"),
    ),
    Row(
        number=14,
        promise="No pickle anywhere; loading never runs code",
        gate={"cases": 1},
        soak={"cases": 1},
        measure=pytest_cases("tests/rewards/test_no_pickle.py"),
    ),
    Row(
        number=15,
        promise="Model text cannot act on terminal or report",
        gate={"cases": 300},
        soak={"cases": 300},
        measure=pytest_cases("tests/cli", "tests/report", "-k", "printable or hostile"),
    ),
    Row(
        number=16,
        promise="Keys never reach disk or logs",
        gate={"cases": 1},
        soak={"cases": 1},
        measure=pytest_cases("tests/rewards/test_http.py", "-k", "key"),
    ),
    Row(
        number=18,
        promise="The core is thoroughly exercised",
        gate={"line_percent": 95, "unsafe_blocks": 5},
        soak={"line_percent": 95, "unsafe_blocks": 5},
        measure=exercised,
    ),
    Row(
        number=19,
        promise="Open after a crash is fast, not proportional to data",
        gate={"rows": 1_000_000, "reader_s": 1.0, "writer_s": 1.0},
        soak={"rows": 10_000_000, "reader_s": 1.0, "writer_s": 1.0},
        measure=opened,
    ),
]


def missed(goal: Mapping[str, float], counts: Mapping[str, float]) -> list[str]:
    """What was not reached."""
    missed = []
    for name, limit in goal.items():
        is_most = name.endswith(("_s", "_blocks"))
        found = counts.get(name)
        if found is None or (found > limit if is_most else found < limit):
            missed.append(f"{name} is {found}, not {'at most' if is_most else 'at least'} {limit}")
    return missed


def text_of(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the reliability goals.")
    parser.add_argument("--rows", help="numbers, with commas; all of them otherwise")
    parser.add_argument("--soak", action="store_true", help="the sizes of a release")
    parser.add_argument("--folder", type=Path, help="on the disk to be tried; /tmp otherwise")
    parser.add_argument("--output", type=Path, default=ROOT / "target" / "goals.json")
    arguments = parser.parse_args()
    chosen = {int(number) for number in arguments.rows.split(",")} if arguments.rows else None
    if chosen and (unknown := chosen - {row.number for row in ROWS}):
        parser.error(f"there is no row {sorted(unknown)}")
    results = []
    for row in ROWS:
        if chosen and row.number not in chosen:
            continue
        goal = row.soak if arguments.soak else row.gate
        print(f"{row.number:>2}  {row.promise}", flush=True)
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="quark-goals-", dir=arguments.folder) as folder:
            outcome = row.measure(goal, Path(folder))
        failures = outcome.failures + missed(goal, outcome.counts)
        print(f"    goal     {text_of(goal)}\n    reached  {text_of(outcome.counts)}")
        print(f"    failures {len(failures)}  ({time.monotonic() - begin:.0f} s)")
        print("".join(f"    ! {failure}\n" for failure in failures[:10]), end="", flush=True)
        results.append(
            {
                "row": row.number,
                "promise": row.promise,
                "size": "soak" if arguments.soak else "gate",
                "goal": dict(goal),
                **asdict(outcome),
                "failures": failures,
                "seconds": round(time.monotonic() - begin),
            }
        )
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    num_failed = sum(bool(result["failures"]) for result in results)
    print(f"{len(results) - num_failed} of {len(results)} rows reached; in {arguments.output}")
    return int(num_failed > 0)


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
