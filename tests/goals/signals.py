"""Runs that are asked to stop by SIGTERM at random moments: no step may be lost, and each can be resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from quark.cli.exit_codes import ExitCode
from quark.cli.stopping import StopOnSignal
from quark.config.load import load_config
from quark.run_directory import RunDirectory
from quark.training.assemble import assemble
from quark.training.state.checkpoint import verify
from tests.training.killed_run import difference, in_fork
from tests.training.tiny_run import Listener, fingerprint_of, rows_of, train, write_inputs


@dataclass(slots=True, kw_only=True)
class Signals:
    """What so many signals did."""

    num_signals: int = 0
    """Lives that left because of one."""
    num_steps: int = 0
    num_runs: int = 0
    """That came to their end, equal to one that nobody disturbed."""
    longest_s: float = 0.0
    """From the signal to the end of the process."""
    problems: list[str] = field(default_factory=list)


def stop_runs(folder: Path, *, num_signals: int, seed: int = 0) -> Signals:
    """Stop runs with SIGTERM and resume them, until so many signals had an effect."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    config = Path(in_fork(folder, lambda: str(write_inputs(folder / "inputs"))))
    begin = time.monotonic()
    expected = in_fork(folder, lambda: _whole(config, folder / "whole"))
    whole_s = time.monotonic() - begin
    signals = Signals()
    run_dir = folder / "run-0"
    while signals.num_signals < num_signals:
        status, seconds = _live(config, run_dir, chance.uniform(0, whole_s / 2), folder / "log.txt")
        what = f"life after signal {signals.num_signals} in {run_dir.name}"
        if status == ExitCode.INTERRUPTED:
            signals.num_signals += 1
            signals.longest_s = max(signals.longest_s, seconds)
            done, kept = in_fork(folder, lambda path=run_dir: _steps(path))
            signals.num_steps += done
            if done != kept:
                signals.problems.append(f"{what}: {done} steps were done and {kept} are kept")
        elif status == 0:
            found = in_fork(folder, lambda path=run_dir: _end_of(fingerprint_of(path)))
            if difference(expected, found):
                signals.problems.append(f"{run_dir.name}: {difference(expected, found)}")
            signals.num_runs += 1
            run_dir = folder / f"run-{signals.num_runs}"
        else:
            signals.problems.append(f"{what}: status {status}")
            break
    return signals


def _whole(config: Path, run_dir: Path) -> dict[str, Any]:
    train(config, run_dir)
    return _end_of(fingerprint_of(run_dir))


def _end_of(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Without the checkpoints before the last one: stopping leaves others than going on does."""
    newest = f"checkpoints/{fingerprint.pop('names')[-1]}/"
    files = fingerprint["files"].items()
    kept = {p: d for p, d in files if not p.startswith("checkpoints/") or p.startswith(newest)}
    return fingerprint | {"files": kept}


def _steps(run_dir: Path) -> tuple[int, int]:
    """Steps in the log, and of the newest checkpoint that verifies."""
    run = RunDirectory(run_dir)
    if not run.metrics.exists():
        return 0, 0
    done = sum(row["event"] == "step" for row in rows_of(run_dir))
    checkpoints = sorted(run.checkpoints.iterdir()) if run.checkpoints.exists() else []
    return done, verify(checkpoints[-1]).step if checkpoints else 0


def _live(config: Path, run_dir: Path, delay_s: float, log: Path) -> tuple[int, float]:
    """Train in a forked process and ask it to stop; its status, and how long stopping took."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _train_as_the_command_does(config, run_dir, writing, log)
    os.close(writing)
    os.read(reading, 1)
    time.sleep(delay_s)
    begin = time.monotonic()
    os.kill(child, signal.SIGTERM)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reading)
    return status, time.monotonic() - begin


def _train_as_the_command_does(config: Path, run_dir: Path, ready: int, log: Path) -> None:
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        with StopOnSignal(lambda text: None) as signals:
            os.write(ready, b"x")
            trainer = assemble(load_config(config, ()), run_dir, listener=Listener())
            signals.ask_through(trainer.request_stop)
            interrupted = trainer.run().interrupted
            status = ExitCode.INTERRUPTED if interrupted else 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


if __name__ == "__main__":
    print(json.dumps(asdict(stop_runs(Path(sys.argv[1]), num_signals=int(sys.argv[2])))))
