"""The names of the pool's score columns."""

from __future__ import annotations

import re

REWARD_COLUMN = "reward"
"""The score column that is trained on."""

GOLD_COLUMN = "gold"
"""The score column of a reward that stands for the truth; it is never ranked."""


def member_column(number: int) -> str:
    """The score column of an ensemble's member, counted from 1."""
    return f"member_{number}"


def column_name(reward: str) -> str:
    """The pool's column for the scores of another reward than the one that is trained on."""
    return re.sub(r"[^a-z0-9_.-]", "_", reward.lower())[-64:]
