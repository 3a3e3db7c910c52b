"""Kills TRL's GRPO with SIGKILL at random moments and checks its pool: `python benches/kill_grpo.py --kills 20`.

TRL and datasets have to be importable: `pip install --target FOLDER --no-deps trl datasets xxhash dill multiprocess`, and
FOLDER on PYTHONPATH. After every kill the run continues from its newest checkpoint. The script checks that

- every rollout that was ever scored is in the pool at the end,
- no rollout that was in the pool when a run began is scored in that run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quark.pool.native import NativePool

ROOT = Path(__file__).parents[1]


def lines(folder: Path) -> list[str]:
    """What was scored so far, in order; a line that a kill cut off is left out."""
    file = folder / "scored.jsonl"
    text = file.read_text() if file.exists() else ""
    return [line for line in text.split("\n")[:-1] if line]


def committed(folder: Path) -> set[str]:
    """The rollouts of the pool, written as the log writes them."""
    if not (folder / "pool").exists():
        return set()
    with NativePool.open(folder / "pool") as pool:
        rows = pool.scan().select("round", "prompt_text", "completion_tokens").collect()
    return {json.dumps(list(row)) for row in rows.iter_rows()}


def start(folder: Path, steps: int) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.grpo", str(folder), str(steps)],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=log,
            stderr=log,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-grpo-"))
    scored_twice = num_kills = 0
    while True:
        before, num_before = committed(folder), len(lines(folder))
        run = start(folder, arguments.steps)
        if num_kills < arguments.kills:
            while run.poll() is None and len(lines(folder)) == num_before:
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 2.0))
            run.send_signal(signal.SIGKILL)
            num_kills += 1
        code = run.wait()
        scored_twice += len(before.intersection(lines(folder)[num_before:]))
        print(
            f"kill {num_kills}: status {code}, {len(lines(folder))} scored, {len(committed(folder))} in the pool, "
            f"{scored_twice} scored twice",
            flush=True,
        )
        if code != -signal.SIGKILL:
            break
    lost = set(lines(folder)) - committed(folder)
    print(
        json.dumps(
            {
                "kills": num_kills,
                "lost": len(lost),
                "scored_twice": scored_twice,
                "folder": str(folder),
            }
        )
    )
    sys.exit(bool(lost or scored_twice or code))


if __name__ == "__main__":
    main()
