"""Defaults and bounds that the pool shares with settings and commands. Imports nothing: ``--help`` names them."""

from __future__ import annotations

NUM_QUANTILES = 5
"""Default number of quantiles."""
MAX_QUANTILES = 2**15 - 1
"""Labels are int16."""
RESCORING_CHUNK = 8192
"""Samples per commit of a rescoring."""
COMPACTED_FILE = 1 << 20
"""Samples in one file of a compacted pool, at most; this many take some 200 MB of memory once."""
FIT_STEPS = 64
"""Optimizer steps of ``quark fit``."""
FIT_EVERY = 8
"""Steps between two measurements of ``quark fit``."""
FIT_HELD_OUT = 0.2
"""Share of the prompts that ``quark fit`` measures on."""
