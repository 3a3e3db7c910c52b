"""The names of the pool's score columns."""

from __future__ import annotations

import re

REWARD_COLUMN = "reward"
"""The score column that is trained on."""


def column_name(reward: str) -> str:
    """The pool's column for the scores of another reward than the one that is trained on."""
    return re.sub(r"[^a-z0-9_.-]", "_", reward.lower())[-64:]
