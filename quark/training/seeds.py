"""Seeds by derivation: everything random in a run is a function of its one seed and a purpose."""

from __future__ import annotations

import hashlib


def derive_seed(run_seed: int, purpose: str, *numbers: int) -> int:
    """A u64 that depends on all arguments and on nothing else.

    >>> derive_seed(0, "explore", 1, 2) == derive_seed(0, "explore", 1, 2) != derive_seed(0, "explore", 2, 1)
    True
    """
    text = "\0".join([str(run_seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
