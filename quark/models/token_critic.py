"""The token critic: what each entry of the vocabulary says of a completion's reward, and the file that keeps it.

A critic is linear: a completion's standardized rank is c + the sum of the scores of its tokens. How it is fitted says
``quark/objectives/tilt.py``. The loss can train reward tokens along it, and sampling can be guided by it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quark.errors import ModelError
from quark.types import Json

CRITIC_FILE = "quark_critic.safetensors"
"""File in a saved policy: its critic."""
DEFAULT_STRENGTH = 2.0
"""Strength at which a saved model without reward tokens is steered, where no run says another."""
STEERING_EXAMPLE = f"""from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
scores = load_file(f"{{folder}}/{CRITIC_FILE}")["scores"]


def along_the_critic(input_ids, logits):
    logits[:, : len(scores)] += {DEFAULT_STRENGTH:g} * scores
    return logits


inputs = tokenizer("The", return_tensors="pt")
output = model.generate(**inputs, logits_processor=[along_the_critic])
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
"""How plain transformers samples the best quantile of a saved model without reward tokens; for the model's card."""
_FORMAT_VERSION = 1
_SCORES, _SAID = "scores", "quark_critic"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCritic:
    """A score for each entry of the base vocabulary."""

    scores: NDArray[np.float32]
    """[W] in standard deviations of the rank, with mean 0 over the tokens that they were fitted on."""
    explained: float
    """Share of the ranks' variance that the critic is estimated to explain in new samples."""
    num_samples: int
    """Samples that it was fitted on."""

    def tilt(self, strength: float, *, quantile: int, num_quantiles: int) -> NDArray[np.float32]:
        """[W] what is added to the logits under a quantile's token; see ``strengths_of``."""
        tilt: NDArray[np.float32] = strengths_of(strength, num_quantiles)[quantile] * self.scores
        return tilt

    def as_lists(self) -> dict[str, Json]:
        """All of it as JSON, to be sent to other processes."""
        return {
            "scores": self.scores.tolist(),
            "explained": self.explained,
            "num_samples": self.num_samples,
        }

    @classmethod
    def from_lists(cls, lists: dict[str, Any]) -> Self:
        """What ``as_lists`` gave."""
        return cls(
            scores=np.array(lists["scores"], dtype=np.float32),
            explained=lists["explained"],
            num_samples=lists["num_samples"],
        )

    def save(self, folder: Path) -> None:
        """Write the critic's file.

        Raises:
            OSError: the disk refused.
            SafetensorError: so it did.
        """
        said = {
            "format_version": _FORMAT_VERSION,
            "explained": self.explained,
            "num_samples": self.num_samples,
        }
        # One entry: several are written in any order, and equal critics would give files that differ.
        save_file({_SCORES: self.scores}, folder / CRITIC_FILE, metadata={_SAID: json.dumps(said)})

    @classmethod
    def read(cls, folder: Path, *, base_vocab_size: int) -> Self | None:
        """The critic of a saved policy, whose folder has been checked for links; None if it has none.

        Raises:
            ModelError: the file is damaged, of a newer quark or of another model.
        """
        path = folder / CRITIC_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                said = json.loads((file.metadata() or {})[_SAID])
                if said["format_version"] != _FORMAT_VERSION:
                    raise ModelError(
                        f"{path}: format version {said['format_version']}, this quark reads {_FORMAT_VERSION}"
                    )
                shape = tuple(file.get_slice(_SCORES).get_shape())
                if shape != (base_vocab_size,):
                    raise ValueError(
                        f"scores of shape {shape} for a vocabulary of {base_vocab_size}"
                    )
                scores = file.get_tensor(_SCORES)
            if scores.dtype != np.float32 or not np.isfinite(scores).all():
                raise ValueError("its scores are no finite float32 numbers")
            return cls(
                scores=scores,
                explained=float(said["explained"]),
                num_samples=int(said["num_samples"]),
            )
        except (
            OSError,
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            OverflowError,
            RecursionError,
        ) as err:
            raise ModelError(f"{path} cannot be read: {err}") from err


class CriticSlot:
    """The critic in force. A run puts a new one in every round; what samples and measures looks here."""

    def __init__(self, critic: TokenCritic | None = None) -> None:
        self.critic = critic


def strengths_of(strength: float, num_quantiles: int) -> NDArray[np.float32]:
    """[K] from ``-strength`` to ``strength``, spaced as the means of equal parts of a normal distribution are."""
    if num_quantiles == 1:
        return np.array([strength], dtype=np.float32)
    normal = NormalDist()
    means = np.array([normal.inv_cdf((k + 0.5) / num_quantiles) for k in range(num_quantiles)])
    strengths: NDArray[np.float32] = (strength * means / means[-1]).astype(np.float32)
    return strengths
