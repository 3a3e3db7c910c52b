"""Runs whose process is killed, again and again, until they get through.

Imports once and forks for every life, so that a life costs less than a second. A child says through a
pipe what it begins and ends (a commit of the pool, a checkpoint, resuming, ...), and the parent kills it a
moment after the n-th beginning of something, however deep in Rust it then is. Operations on files that
Python itself does are met exactly: there the child kills itself just before the n-th one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quark import publication
from quark.pool.native import NativePool
from quark.training.loop.outputs import Outputs
from quark.training.state.checkpoint import Checkpoints
from tests.training.tiny_run import Listener, fingerprint_of, train, write_inputs

FILE_OPERATIONS = frozenset(
    {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
)
PLACES = {
    "commit": 3,
    "checkpoint": 2,
    "publish": 2,
    "prune": 1,
    "model": 1,
    "start": 1,
    "event": 1,
    "file": 2,
}
"""What a life can end in, and how often. ``file`` is any operation on the run's files by Python, ``event`` a report
of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A life ends ``delay_s`` after the ``number``-th beginning of ``place``."""

    place: str
    number: int
    delay_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Life:
    """What one process did."""

    status: int = 0
    """Exit status; negative: the signal that ended it."""
    begun: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Time from beginnings to ends, in all, by place."""
    open: dict[str, float] = field(default_factory=dict)
    """What had begun and not ended, with the time of its beginning."""


def live(
    config: Path, run_dir: Path, death: Death | None, log: Path, *, overlaps: bool = False
) -> Life:
    """Train in a forked process, to the end or to ``death``."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        in_child(log, lambda: run_and_tell(config, run_dir, death, writing, overlaps=overlaps))
    os.close(writing)
    life = Life()
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        for line in iter(pipe.readline, b""):
            what, place = line.decode().split()
            if what == "end":
                life.seconds[place] += time.monotonic() - life.open.pop(place)
                continue
            life.begun[place] += 1
            if place not in ("event", "file"):
                life.open[place] = time.monotonic()
            if death is not None and (place, life.begun[place]) == (death.place, death.number):
                time.sleep(death.delay_s)
                os.kill(child, signal.SIGKILL)
    life.status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return life


def in_child(log: Path, work: Callable[[], None]) -> None:
    """Do ``work`` with all output in ``log``, and leave."""
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def run_and_tell(
    config: Path, run_dir: Path, death: Death | None, pipe: int, *, overlaps: bool
) -> None:
    """Train, saying what begins and what ends."""

    def tell(what: str, place: str) -> None:
        os.write(pipe, f"{what} {place}\n".encode())

    def told(owner: Any, name: str, place: str) -> None:
        function = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tell("begin", place)
            result = function(*args, **kwargs)
            tell("end", place)
            return result

        setattr(owner, name, wrapper)

    told(NativePool, "append", "commit")
    told(Checkpoints, "save", "checkpoint")
    told(publication, "publish_directory", "publish")
    told(Checkpoints, "prune", "prune")
    told(Outputs, "publish", "model")
    operations = 0

    def before_operation(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal operations
        if event not in FILE_OPERATIONS or not str(arguments[0]).startswith(f"{run_dir}{os.sep}"):
            return
        operations += 1
        tell("begin", "file")
        if death is not None and (death.place, death.number) == ("file", operations):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(before_operation)
    tell("begin", "start")
    is_starting = True

    def at_event(number: int) -> None:
        nonlocal is_starting
        # The first event says that loading begins, the second that the run goes on.
        if is_starting and number == 2:
            is_starting = False
            tell("end", "start")
        tell("begin", "event")

    overrides = (f"run.overlap_scoring={str(overlaps).lower()}",)
    train(config, run_dir, overrides=overrides, listener=Listener(at_event=at_event))


def in_fork(folder: Path, work: Callable[[], object]) -> Any:
    """What ``work`` returns, as JSON has it, done in a process of its own: threads do not survive a fork."""
    result = folder / "result.json"
    child = os.fork()
    if child == 0:
        in_child(folder / "log.txt", lambda: void(result.write_text(json.dumps(work()))))
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError((folder / "log.txt").read_text()[-2000:])
    return json.loads(result.read_text())


def void(value: object) -> None:
    """Drop a value."""


def choose_death(chance: random.Random, whole: Life, *, is_second: bool) -> Death:
    """Somewhere in a life; often while resuming in those that come after a death."""
    (place,) = chance.choices(list(PLACES), weights=list(PLACES.values()))
    if is_second and chance.random() < 0.3:
        place = "start"
    limit = max(whole.begun[place] // (2 if is_second else 1), 1)
    mean_s = whole.seconds[place] / whole.begun[place]
    return Death(
        place=place, number=chance.randint(1, limit), delay_s=chance.uniform(0.0, 1.2 * mean_s)
    )


def run_trials(folder: Path, *, num_trials: int, seed: int) -> bool:
    """Kill and resume ``num_trials`` runs, compare each with an undisturbed one, and say what happened."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    log = folder / "log.txt"
    config = Path(in_fork(folder, lambda: str(write_inputs(folder / "inputs"))))
    whole = live(config, folder / "whole", None, log)
    assert whole.status == 0, log.read_text()[-2000:]
    assert all(whole.begun[place] for place in PLACES)
    expected = in_fork(folder, lambda: fingerprint_of(folder / "whole"))
    kills: Counter[str] = Counter()
    num_equal = num_killed_twice = num_killed_resuming = trial = 0
    while trial < num_trials:
        run_dir = folder / f"run-{trial}"
        wanted = chance.choice([1, 2, 2, 3])
        deaths: list[Death] = []
        while True:
            death = None
            if len(deaths) < wanted:
                death = choose_death(chance, whole, is_second=bool(deaths))
            life = live(config, run_dir, death, log, overlaps=chance.random() < 0.5)
            if life.status != -signal.SIGKILL or death is None:
                break
            num_killed_resuming += bool(deaths) and "start" in life.open
            deaths.append(death)
            kills.update(list(life.open) or ["elsewhere"])
        if not deaths and life.status == 0:
            shutil.rmtree(run_dir)  # it ended before its death came
            continue
        trial += 1
        num_killed_twice += len(deaths) > 1
        problem = f"status {life.status}" if life.status else ""
        if not problem:
            problem = difference(expected, in_fork(folder, partial(fingerprint_of, run_dir)))
        if problem:
            print(f"trial {trial} (seed {seed}): {problem}; deaths: {deaths}", flush=True)
            print(log.read_text()[-2000:], file=sys.stderr, flush=True)
        else:
            num_equal += 1
            shutil.rmtree(run_dir)
    by_place = ", ".join(f"{count} in {place}" for place, count in kills.most_common())
    print(
        f"{num_equal} of {num_trials} runs killed and resumed ended byte-equal; "
        f"{num_killed_twice} of them were killed more than once, {num_killed_resuming} times while they "
        f"resumed. Kills: {by_place}",
        flush=True,
    )
    return num_equal == num_trials


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Names what differs."""
    return ", ".join(f"{key} differ" for key in expected if expected[key] != found.get(key))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Kill runs at random instants and resume them.")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quark-kill-") as folder:
        is_good = run_trials(Path(folder), num_trials=arguments.trials, seed=arguments.seed)
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
