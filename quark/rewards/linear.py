"""A linear scorer over hashed n-grams: tens of thousands of texts a second on one core.

    score = sigmoid(bias + sum(weights of character n-grams) / sqrt(their number)
                         + sum(weights of word n-grams)      / sqrt(their number))

so a score lies in (0, 1), is continuous, and equals ``sigmoid(bias)`` for an empty text. A scorer is a
folder of ``weights.safetensors`` and ``scorer.json``; ``linear_training.py`` makes one. Stored are the weights
that are not zero (``characters.index`` and ``words.index`` uint32, ascending; ``characters.weight`` and
``words.weight`` float16); in memory they spread over two tables of ``2**bits`` float32, many times larger
than the vocabulary, so that an unseen n-gram rarely meets the weight of another. Features:
``hashed_features.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from quark.errors import RewardError
from quark.publication import publish_file
from quark.rewards.hashed_features import NgramIndices, TextBatch, character_ngrams, word_ngrams
from quark.rewards.source_files import hashes
from quark.safe_files import check_tree, read_text
from quark.settings import Settings, misfits
from quark.types import Json

WEIGHTS_FILE: Final = "weights.safetensors"
SETTINGS_FILE: Final = "scorer.json"
_FORMAT: Final = "quark-linear-scorer-1"
_TEXTS_AT_ONCE: Final = 1024


class LinearScorerSettings(Settings):
    """The contents of ``scorer.json``: everything that scoring needs besides the weights."""

    format: str = _FORMAT
    """Names the features and the formula; another value is refused."""
    name: str
    """Name of the reward."""
    bits: int = Field(ge=8, le=24)
    """Each of the two weight tables has ``2**bits`` entries."""
    bias: float
    """Log-odds of a text without known features."""
    is_penalty: bool = False
    """The score measures something unwanted, so the reward is one minus the score."""


def scorer_format(folder: Path) -> str | None:
    """The format that ``scorer.json`` in ``folder`` states; None if it cannot be read or states none."""
    try:
        said = json.loads(read_text(folder / SETTINGS_FILE, folder))
    except (OSError, ValueError, RecursionError):
        return None
    found = said.get("format") if isinstance(said, dict) else None
    return found if isinstance(found, str) else None


class LinearScorer:
    """Scores texts with two weight tables.

    >>> from quark.assets import asset_path
    >>> scorer = LinearScorer.load(asset_path("rewards", "sentiment"))
    >>> bad, good = scorer.score_texts(["breaks after a week", "easy to use, great pictures"])
    >>> bool(bad < 0.2 < 0.8 < good)
    True
    """

    def __init__(
        self,
        settings: LinearScorerSettings,
        *,
        characters: NDArray[np.floating],
        words: NDArray[np.floating],
    ) -> None:
        self.settings = settings
        # Through float16, so that a scorer scores the same before it is saved and after.
        self._characters = characters.astype(np.float16).astype(np.float32)
        self._words = words.astype(np.float16).astype(np.float32)

    @classmethod
    def load(cls, folder: Path) -> LinearScorer:
        """Read a scorer's folder.

        Raises:
            RewardError: A file is missing, or is not a scorer of this format.
            UnsafeFileError: A file is a link out of the folder, or not a plain file.
        """
        try:
            settings = LinearScorerSettings.model_validate_json(
                read_text(folder / SETTINGS_FILE, folder)
            )
            check_tree(folder / WEIGHTS_FILE, folder)
            tensors = load_file(folder / WEIGHTS_FILE)
        except ValidationError as err:
            problems = "; ".join(str(misfit) for misfit in misfits(err))
            raise RewardError(
                f"{folder} does not hold a linear scorer: {SETTINGS_FILE}: {problems}"
            ) from err
        except (OSError, SafetensorError, ValueError) as err:
            raise RewardError(f"{folder} does not hold a linear scorer: {err}") from err
        if settings.format != _FORMAT:
            raise RewardError(
                f"{folder / SETTINGS_FILE}: format is {settings.format!r}, supported is {_FORMAT!r}"
            )
        characters, words = (
            _spread(tensors, kind, settings.bits, folder / WEIGHTS_FILE)
            for kind in ("characters", "words")
        )
        return cls(settings, characters=characters, words=words)

    def save(self, folder: Path) -> None:
        """Write the folder's two files; weights are stored as float16."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, NDArray[np.generic]] = {}
        for kind, table in (("characters", self._characters), ("words", self._words)):
            index = np.flatnonzero(table)
            tensors[f"{kind}.index"] = index.astype(np.uint32)
            tensors[f"{kind}.weight"] = table[index].astype(np.float16)
        publish_file(folder / WEIGHTS_FILE, save(tensors))
        text = json.dumps(self.settings.model_dump(), indent=2)
        publish_file(folder / SETTINGS_FILE, text + "\n")

    @property
    def num_weights(self) -> int:
        """Number of nonzero weights."""
        return int(np.count_nonzero(self._characters) + np.count_nonzero(self._words))

    def score_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Float32 [N] in (0, 1); the score of a text does not depend on its batch."""
        scores = np.empty(len(texts), dtype=np.float32)
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = texts[start : start + _TEXTS_AT_ONCE]
            scores[start : start + len(part)] = self._score_batch(TextBatch.of(part))
        return scores

    def _score_batch(self, batch: TextBatch) -> NDArray[np.float32]:
        bits, num_texts = self.settings.bits, len(batch.starts)
        log_odds = (
            self.settings.bias
            + _normalized_sums(self._characters, character_ngrams(batch, bits), num_texts)
            + _normalized_sums(self._words, word_ngrams(batch, bits), num_texts)
        )
        probability: NDArray[np.float32] = (0.5 + 0.5 * np.tanh(0.5 * log_odds)).astype(np.float32)
        return probability


def _spread(
    tensors: Mapping[str, NDArray[np.generic]], kind: str, bits: int, file: Path
) -> NDArray[np.float32]:
    """The table [2**bits] of the stored weights of one kind, checked."""
    index, weight = tensors.get(f"{kind}.index"), tensors.get(f"{kind}.weight")
    if index is None or weight is None or index.ndim != 1 or index.shape != weight.shape:
        raise RewardError(f"{file}: {kind}.index and {kind}.weight must be there, of one length")
    if index.dtype != np.uint32 or weight.dtype != np.float16:
        raise RewardError(
            f"{file}: {kind} is {index.dtype} and {weight.dtype}, not uint32 and float16"
        )
    if (index >= 2**bits).any() or not np.isfinite(weight.astype(np.float32)).all():
        raise RewardError(
            f"{file}: {kind} has an index past {2**bits} or a weight that is not finite"
        )
    table = np.zeros(2**bits, dtype=np.float32)
    table[index] = weight
    return table


def _normalized_sums(
    table: NDArray[np.float32], ngrams: Sequence[NgramIndices], num_texts: int
) -> NDArray[np.float64]:
    """Per text, the sum of its n-grams' weights over the square root of their number; 0 without any."""
    sums = np.zeros(num_texts)
    counts = np.zeros(num_texts)
    for found in ngrams:
        sums += np.bincount(found.text, weights=table[found.index], minlength=num_texts)
        counts += np.bincount(found.text, minlength=num_texts)
    normalized: NDArray[np.float64] = sums / np.sqrt(np.maximum(counts, 1.0))
    return normalized


class LinearReward:
    """The reward of a linear scorer: its score, or one minus it for a penalty such as toxicity."""

    def __init__(self, scorer: LinearScorer, *, folder: Path) -> None:
        self._scorer = scorer
        self._folder = folder
        self._sha256 = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
        self._files = hashes([folder / SETTINGS_FILE], folder)

    @classmethod
    def load(cls, folder: Path) -> LinearReward:
        """Read the scorer in ``folder``; errors as in ``LinearScorer.load``."""
        return cls(LinearScorer.load(folder), folder=folder)

    @property
    def name(self) -> str:
        """The name in the scorer's settings."""
        return self._scorer.settings.name

    @property
    def provenance(self) -> Mapping[str, Json]:
        """The origin of the weights, and the hash of weights and settings."""
        return {"folder": str(self._folder), "sha256": self._sha256, "files": dict(self._files)}

    def __call__(self, *, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Score the completions, one minus the score for a penalty; the prompts have no influence."""
        del prompts  # the score is a property of the completion
        scores = self._scorer.score_texts(completions)
        if self._scorer.settings.is_penalty:
            scores = np.float32(1.0) - scores
        return [float(score) for score in scores]
