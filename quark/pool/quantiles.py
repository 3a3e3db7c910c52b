"""How many quantiles a ranking is cut into. Imports nothing, so that ``--help`` can name the numbers."""

from __future__ import annotations

NUM_QUANTILES = 5
"""K where nobody says another number."""
MAX_QUANTILES = 2**15 - 1
"""Labels are int16."""
