"""The length of a model's context, wherever its configuration keeps it."""

from __future__ import annotations

from typing import Any

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def context_length(config: Any) -> int | None:  # noqa: ANN401 - every family has its own class
    """The most tokens that the model of a configuration sees; None if it has no limit.

    Configurations of models with several parts keep it in that of their text model.
    """
    text = config.get_text_config(decoder=True)
    for name in _NAMES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
