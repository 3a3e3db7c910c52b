"""Kill tiny training runs at random instants, resume them, and compare every byte that they leave.

    python scripts/kill_trials.py --trials 100

A run is killed once to three times (SIGKILL): inside commits of the pool, inside checkpoints and their
publication, while old checkpoints are removed, while the model is saved, while it resumes, at any of its
operations on files, and in between. It must end with the bytes of a run that nobody disturbed: weights,
optimizer, pool and, but for times, the metric log. Prints the count; the status is 1 if any run differs.
A trial takes two to four seconds of one core.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(ROOT))
    from tests.training.killed_run import main

    main()
