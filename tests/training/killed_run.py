"""A run whose process is killed, again and again, until it gets through.

    python -m tests.training.killed_run CONFIG RUN_DIR SEED NUM_KILLS

Imports once and forks for every life, so that a life costs less than a second. A life ends at a random
event (right after a commit, between steps, before a checkpoint) or a random time after one (inside them).
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from tests.training.tiny_run import Listener, train


def live(config: Path, run_dir: Path, *, die_at_event: int | None, delay_s: float) -> int:
    """Train in a forked process; returns its status (negative: the signal)."""
    child = os.fork()
    if child == 0:

        def at_event(number: int) -> None:
            if number == die_at_event:
                if delay_s == 0.0:
                    os.kill(os.getpid(), signal.SIGKILL)
                threading.Thread(target=die_after, args=(delay_s,), daemon=True).start()

        try:
            train(config, run_dir, listener=Listener(at_event=at_event))
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_after(delay_s: float) -> None:
    time.sleep(delay_s)
    os.kill(os.getpid(), signal.SIGKILL)


def main(config: Path, run_dir: Path, seed: int, num_kills: int) -> None:
    chance = random.Random(seed)
    killed = 0
    while True:
        doomed = killed < num_kills
        status = live(
            config,
            run_dir,
            die_at_event=chance.randint(1, 16) if doomed else None,
            delay_s=chance.choice([0.0, chance.uniform(0.0, 0.05)]),
        )
        if status == -signal.SIGKILL:
            killed += 1
            continue
        print(f"killed {killed} times, then status {status}")
        sys.exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
