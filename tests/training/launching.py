"""Starts two processes of one run on the CPU, as a launcher such as ``torchrun`` does."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240
"""Far beyond what a run takes. The tests check that no process hangs."""

FORKS = multiprocessing.get_context("forkserver")
# Most of a short run's time is the import of torch and transformers. The server imports them once and forks.
FORKS.set_forkserver_preload(["tests.training.trainer_process", "quark.training.assemble"])


@dataclass(frozen=True)
class Ended:
    """What the two processes left, by rank."""

    codes: list[int | None]
    out: list[str]
    err: list[str]
    weights: list[str | None]
    held: list[int | None]
    seconds: float


def launch(
    config: Path,
    run_dir: Path,
    *overrides: str,
    environment: Mapping[str, str] | None = None,
    new_interpreter: bool = False,
    **plan: Any,
) -> Ended:
    """Run two processes to their ends.

    Args:
        config: the configuration's file.
        run_dir: of both.
        overrides: ``KEY=VALUE``.
        environment: variables that both get.
        new_interpreter: start ``python`` for each instead of forking. Slower. Tests what imports read from the
            environment, and how an interpreter ends.
        plan: the mishap, see ``tests.training.trainer_process``.
    """
    arguments = ["train", str(config), "--run-dir", str(run_dir), "--json"]
    for override in overrides:
        arguments += ["--set", override]
    weights = run_dir.with_suffix(".weights")
    held = run_dir.with_name(f"{run_dir.name}_held")
    plan |= {"arguments": arguments, "weights": str(weights), "held": str(held)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | (environment or {})
    shared |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1"}
    environments = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    begin = time.monotonic()
    if new_interpreter:
        codes, out, err = in_new_interpreters(plan, environments)
    else:
        codes, out, err = in_forks(plan, environments, run_dir)
    texts = [
        [file.read_text() if file.exists() else None for file in files]
        for files in (
            [path.with_suffix(f".{rank}") for rank in range(2)] for path in (weights, held)
        )
    ]
    return Ended(
        codes=codes,
        out=out,
        err=err,
        weights=texts[0],
        held=[None if text is None else int(text) for text in texts[1]],
        seconds=time.monotonic() - begin,
    )


def in_new_interpreters(
    plan: dict[str, Any], environments: list[dict[str, str]]
) -> tuple[list[int | None], list[str], list[str]]:
    """Exit codes, stdout and stderr, by rank."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.trainer_process", json.dumps(plan)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    return codes, [out for out, _ in said], [err for _, err in said]


def in_forks(
    plan: dict[str, Any], environments: list[dict[str, str]], run_dir: Path
) -> tuple[list[int | None], list[str], list[str]]:
    """Exit codes, stdout and stderr, by rank."""
    files = [[run_dir.with_name(f"{name}.{rank}") for name in ("out", "err")] for rank in range(2)]
    processes: list[BaseProcess] = [
        FORKS.Process(target=as_command, args=(plan, environment, *map(str, outputs)))
        for environment, outputs in zip(environments, files, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(TIMEOUT_S)
            assert process.exitcode is not None, "the process hangs"
    finally:
        for process in processes:
            process.kill()
    out, err = ([pair[which].read_text() for pair in files] for which in range(2))
    return [process.exitcode for process in processes], out, err


def as_command(plan: dict[str, Any], environment: dict[str, str], out: str, err: str) -> None:
    """In a fork: behave as ``python -m tests.training.trainer_process`` in a new interpreter."""
    from tests.training.trainer_process import main

    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    main(plan)
