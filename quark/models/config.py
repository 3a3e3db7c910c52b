"""The configuration of the model. Imports no torch, so reading a configuration stays fast."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from quark.settings import Settings


class LoraConfig(Settings):
    """Train low-rank adapters instead of all weights (Hu et al. 2021)."""

    rank: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains all weights. Needs the package ``peft``."""
    alpha: float = Field(16.0, gt=0.0)
    """The adapters' output is scaled by ``alpha / rank``."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the adapters' inputs that is dropped in training steps, never elsewhere. Above 0,
    the KL that steps report includes dropout noise."""
    target_modules: tuple[str, ...] = ()
    """Names, or ends of names, of the modules that get an adapter, e.g. ``["q_proj", "v_proj"]``.
    Unset takes every linear layer except the vocabulary head, and the routers and fused experts of
    a mixture."""


class ModelConfig(Settings):
    """The model to train."""

    name: str = "embedded:reviews"
    """Hub name, folder, path of a ``.gguf`` file, ``package:NAME`` or ``package:NAME/FOLDER`` (a
    folder of an installed Python package), or ``embedded:reviews`` (ships with quark)."""
    gguf_file: str | None = None
    """Name of a GGUF file in that repository or folder; it is converted once and cached."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    cache_dir: Path | None = None
    """Folder for converted GGUF models; unset is ``quark/models`` in the user's cache folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights."""
    gradient_checkpointing: bool = False
    """Recompute each layer in backward instead of keeping its activations: less memory, about a
    third more time, the same numbers."""
    reward_tokens: bool = True
    """Begin every prompt with the reward token of a quantile, as in the paper. If off, the model gets
    no new token, and its quantiles differ by the token critic alone: needs ``sampling.guide =
    "critic"`` and no term that trains tokens. No drift is spent on a token then, and the saved model
    has the vocabulary of the original one."""
    shift_positions: bool | None = None
    """Give the reward token a position of its own, so that prompts and completions keep the
    positions that the original model gives them. Unset: on if positions are absolute (GPT-2, OPT),
    else off."""
    reward_token_std_scale: float = Field(1.0, ge=0.0)
    """Spread of the new reward tokens' vectors, in standard deviations of the existing ones. 0
    starts all of them at the same vector, the mean, so they differ only by what they learn. Random
    vectors start as K random distributions, which is more noise than signal if there are few
    samples."""
    lowest_words: tuple[str, ...] = ()
    """Start the reward tokens from known meanings: the lowest from the mean vector of these words,
    the best from that of ``highest_words``, the others in between. Unset draws them at random, as
    in the paper. In a short run, this saves many steps."""
    highest_words: tuple[str, ...] = ()
    """The words for the best token; see ``lowest_words``."""
    lora: LoraConfig = LoraConfig()
    """Train low-rank adapters instead of all weights."""

    @model_validator(mode="after")
    def _has_both_ends(self) -> Self:
        if bool(self.lowest_words) != bool(self.highest_words):
            raise ValueError("lowest_words and highest_words belong together: give both or none")
        if not self.reward_tokens and (self.lowest_words or self.shift_positions):
            raise ValueError(
                "lowest_words, highest_words and shift_positions are about reward tokens, and model.reward_tokens is "
                "off: leave them out"
            )
        return self
