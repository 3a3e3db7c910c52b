"""Running quark's command line from a test, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quark.cli.app import run
from quark.config.load import load_config
from quark.training.assemble import assemble
from quark.training.events import TrainingResult
from tests.training.tiny_run import Listener

ROOT = Path(__file__).parents[2]

TINY_SETTINGS = (
    "run.num_rounds=2",
    "run.steps_per_round=2",
    "run.prompts_first_round=40",
    "run.prompts_per_round=20",
    "run.chunk_size=20",
    "run.num_threads=1",
    "optimizer.batch_size=10",
    "prompts.num_evaluation=8",
    "sampling.max_new_tokens=6",
    "pool.num_quantiles=5",
    "evaluation.every_rounds=1",
)
TINY_RUN = [part for setting in TINY_SETTINGS for part in ("--set", setting)]
"""The demo preset on the embedded model with one quantile more, in about a second."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout as the one JSON value that it must be."""
        return json.loads(self.out, parse_constant=refuse)


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def quark(*arguments: str | Path) -> Outcome:
    """Run a command in this process, not on a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Outcome(int(code), out.getvalue(), err.getvalue())


def trained_run(run_dir: Path, *settings: str) -> TrainingResult:
    """Train as ``quark train`` with TINY_RUN does, without the command, whose report takes half of the time."""
    loaded = load_config("demo", (*TINY_SETTINGS, *settings))
    return assemble(loaded, run_dir, listener=Listener()).run()


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.Popen(
        [sys.executable, "-m", "quark", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def quark_process(*arguments: str | Path) -> Outcome:
    """Run a command in a process of its own and wait for it."""
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, err)
