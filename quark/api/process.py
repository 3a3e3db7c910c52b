"""Settings of the process that libraries read when they are imported or first used."""

from __future__ import annotations

import os


def prepare_process() -> None:
    """Set what quark needs, unless the user has set it: no code from the Hub, no waiting threads that spin."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Code of the Hub that transformers fetches by itself where the package `kernels` is installed.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    # Torch's threads spin while they wait for each other; where another process wants the cores too, a
    # spinning thread keeps the very one it waits for from running.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
