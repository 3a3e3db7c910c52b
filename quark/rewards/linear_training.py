"""Training of a linear scorer from labeled texts: logistic regression with an L2 penalty.

Targets are labels 0 and 1 or scores in [0, 1]; both are fitted by cross-entropy, so the scorer's output
is a calibrated probability or the expected score. Features are weighted by their inverse frequency, which
decides how hard the penalty pulls on each; the weighting is folded into the stored weights.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from quark.bounded_files import lines_of, parse_json
from quark.errors import DataError
from quark.printable import counted
from quark.publication import publish_file
from quark.rewards.hashed_features import NgramIndices, TextBatch, character_ngrams, word_ngrams
from quark.rewards.held_out_report import HeldOutReport, held_out_figures
from quark.rewards.linear import WEIGHTS_FILE, LinearScorer, LinearScorerSettings

_MIN_OCCURRENCES = 2
_MIN_EXAMPLES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledText:
    """A text and its target score; ``target`` lies in [0, 1]."""

    text: str
    target: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport(HeldOutReport):
    """The result of a training of a linear scorer."""

    num_weights: int
    """Number of nonzero weights."""
    num_bytes: int
    """Size of the weight file."""
    seconds: float


def train_linear_scorer(
    data: Path,
    folder: Path,
    *,
    name: str | None = None,
    text_field: str = "text",
    target_field: str | None = None,
    is_penalty: bool = False,
    held_out_fraction: float = 0.1,
    l2: float = 1.0,
    bits: int = 20,
    on_progress: Callable[[str], None] | None = None,
) -> TrainReport:
    """Train on a JSONL file and write the scorer with its model card into ``folder``.

    Args:
        data: JSON lines, each with a text and a target.
        folder: folder of the scorer; replaces the files of an earlier one.
        name: name of the reward; the folder's name if not given.
        text_field: the field of the text.
        target_field: the field of the target in [0, 1]; without it ``label``, then ``score``, of the
            first line decides.
        is_penalty: the target is something unwanted; as a reward the scorer gives one minus its score.
        held_out_fraction: share of the texts that only the report sees, chosen by a hash of the text.
        l2: strength of the penalty; larger is smoother.
        bits: ``2**bits`` entries in each of the two weight tables.
        on_progress: is told one line at a time what goes on.

    Raises:
        DataError: A line is not JSON, lacks a field or has a target outside [0, 1]; or there are fewer
            than 20 texts to train on or to hold out, or only one class.
    """
    examples = read_labelled_texts(data, text_field=text_field, target_field=target_field)
    train, held_out = split_by_text(examples, held_out_fraction)
    return fit_linear_scorer(
        train,
        held_out,
        folder,
        name=name or folder.name,
        is_penalty=is_penalty,
        l2=l2,
        bits=bits,
        source=data.name,
        on_progress=on_progress,
    )


def read_labelled_texts(
    path: Path,
    *,
    text_field: str = "text",
    target_field: str | None = None,
    max_text_bytes: int | None = None,
) -> list[LabelledText]:
    """All lines of a JSONL file; errors as in ``train_linear_scorer``, and for a text of more than ``max_text_bytes``."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    examples = []
    for number, line in lines_of(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse_json(line)
        except ValueError as err:
            raise DataError(f"{where}: {err}") from err
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON object is needed, not {type(row).__name__}")
        if target_field is None:
            target_field = "label" if "label" in row else "score"
        examples.append(_labelled_text(row, text_field, target_field, where))
        num_bytes = len(examples[-1].text.encode())
        if max_text_bytes is not None and num_bytes > max_text_bytes:
            raise DataError(
                f"{where}: the text has {num_bytes:,} bytes, the most is {max_text_bytes:,}"
            )
    return examples


def _labelled_text(
    row: dict[str, object], text_field: str, target_field: str, where: str
) -> LabelledText:
    for field in (text_field, target_field):
        if field not in row:
            raise DataError(f"{where}: no field {field!r}; there is: {', '.join(map(repr, row))}")
    text, target = row[text_field], row[target_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: {text_field!r} must be a text, not {repr(text)[:40]}")
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise DataError(
            f"{where}: {text_field!r} holds half of a character (a lone surrogate)"
        ) from err
    if not isinstance(target, int | float) or not 0 <= target <= 1:
        raise DataError(
            f"{where}: {target_field!r} must be a number in [0, 1], not {repr(target)[:40]}"
        )
    return LabelledText(text=text, target=float(target))


def split_by_text(
    examples: Sequence[LabelledText], held_out_fraction: float
) -> tuple[list[LabelledText], list[LabelledText]]:
    """The examples to train on and those to hold out, by a hash of the text: copies stay on one side."""
    train: list[LabelledText] = []
    held_out: list[LabelledText] = []
    for example in examples:
        is_held_out = _hash_share(example.text) < held_out_fraction
        (held_out if is_held_out else train).append(example)
    return train, held_out


def _hash_share(text: str) -> float:
    """A number in [0, 1) that only depends on the text, so copies of a text stay on one side."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "little") / 2**64


def fit_linear_scorer(
    train: Sequence[LabelledText],
    held_out: Sequence[LabelledText],
    folder: Path,
    *,
    name: str,
    is_penalty: bool = False,
    l2: float = 1.0,
    bits: int = 20,
    source: str = "labeled texts",
    card: Callable[[TrainReport], str] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> TrainReport:
    """Fit on ``train``, judge on ``held_out``, write both files and the model card.

    ``card`` replaces the generated model card. Other arguments and errors as in ``train_linear_scorer``.
    """
    started = time.perf_counter()
    tell = on_progress or (lambda _: None)
    check_examples(train, held_out, source)
    tell(f"hashing {len(train):,} texts")
    features = _FeatureMatrix.of([example.text for example in train], bits)
    targets = np.array([example.target for example in train])
    tell(f"fitting {features.num_used:,} features")
    bias, weights = _fit_logistic(features, targets, l2)
    scorer = LinearScorer(
        LinearScorerSettings(name=name, bits=bits, bias=bias, is_penalty=is_penalty),
        characters=weights[: 2**bits],
        words=weights[2**bits :],
    )
    scorer.save(folder)
    tell(f"scoring {len(held_out):,} held-out texts")
    scores = scorer.score_texts([example.text for example in held_out]).astype(np.float64)
    truth = np.array([example.target for example in held_out])
    report = TrainReport(
        folder=folder,
        num_train=len(train),
        **held_out_figures(scores, truth),
        num_weights=scorer.num_weights,
        num_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        seconds=time.perf_counter() - started,
    )
    text = (
        card(report)
        if card
        else model_card(report, name=name, source=source, is_penalty=is_penalty)
    )
    publish_file(folder / "README.md", text)
    return report


def check_examples(
    train: Sequence[LabelledText], held_out: Sequence[LabelledText], source: str
) -> None:
    """Raise DataError if there are too few texts, or if all targets are equal."""
    for what, examples in (("train on", train), ("hold out", held_out)):
        if len(examples) < _MIN_EXAMPLES:
            raise DataError(
                f"{source}: {counted(len(examples), 'text')} to {what}, at least {_MIN_EXAMPLES} are needed"
            )
    if len({example.target for example in train}) == 1:
        raise DataError(
            f"{source}: every target is {train[0].target}, so there is nothing to learn"
        )


@dataclass(frozen=True, slots=True)
class _FeatureMatrix:
    """Sparse [N, 2 * 2**bits]; entry m adds ``value[m]`` at ``(row[m], column[m])``.

    ``scale`` [2 * 2**bits] is each feature's inverse-frequency weight, 0 where it is seen only once.
    """

    row: NDArray[np.intp]
    column: NDArray[np.intp]
    value: NDArray[np.float64]
    scale: NDArray[np.float64]
    num_rows: int

    @classmethod
    def of(cls, texts: Sequence[str], bits: int) -> _FeatureMatrix:
        batch = TextBatch.of(texts)
        columns, rows, values = [], [], []
        for offset, ngrams in (
            (0, character_ngrams(batch, bits)),
            (2**bits, word_ngrams(batch, bits)),
        ):
            row = np.concatenate([found.text for found in ngrams])
            counts = np.bincount(row, minlength=len(texts))
            columns.append(_concatenated(ngrams) + offset)
            rows.append(row)
            values.append(1.0 / np.sqrt(counts[row]))
        column = np.concatenate(columns)
        occurrences = np.bincount(column, minlength=2 * 2**bits)
        scale = np.log((1 + len(texts)) / (1 + np.minimum(occurrences, len(texts)))) + 1
        scale[occurrences < _MIN_OCCURRENCES] = 0.0
        value = np.concatenate(values) * scale[column]
        used = value != 0
        return cls(
            row=np.concatenate(rows)[used],
            column=column[used],
            value=value[used],
            scale=scale,
            num_rows=len(texts),
        )

    @property
    def num_used(self) -> int:
        return int(np.count_nonzero(self.scale))

    def times(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N]: the matrix times a column of weights."""
        products = self.value * weights[self.column]
        return np.bincount(self.row, weights=products, minlength=self.num_rows).astype(np.float64)

    def transposed_times(self, residuals: NDArray[np.float64]) -> NDArray[np.float64]:
        """[2 * 2**bits]: the transposed matrix times a column of residuals."""
        products = self.value * residuals[self.row]
        return np.bincount(self.column, weights=products, minlength=len(self.scale)).astype(
            np.float64
        )


def _concatenated(ngrams: Iterable[NgramIndices]) -> NDArray[np.intp]:
    return np.concatenate([found.index.astype(np.intp) for found in ngrams])


def _fit_logistic(
    features: _FeatureMatrix, targets: NDArray[np.float64], l2: float
) -> tuple[float, NDArray[np.float64]]:
    """Bias and weights (inverse frequency folded in) of the penalized maximum likelihood."""
    prior = float(np.clip(targets.mean(), 1e-3, 1 - 1e-3))
    parameters = torch.zeros(1 + len(features.scale), dtype=torch.float64)
    parameters[0] = math.log(prior / (1 - prior))
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=100,
        history_size=10,
        tolerance_grad=1e-4,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        values = parameters.numpy()
        bias, weights = values[0], values[1:]
        log_odds = bias + features.times(weights)
        # Cross-entropy of a soft target: log(1 + exp(z)) - y z.
        loss = float(np.sum(np.logaddexp(0.0, log_odds) - targets * log_odds))
        residuals = 0.5 + 0.5 * np.tanh(0.5 * log_odds) - targets
        gradient = np.empty_like(values)
        gradient[0] = residuals.sum()
        gradient[1:] = features.transposed_times(residuals) + l2 * weights
        parameters.grad = torch.from_numpy(gradient)
        return loss + 0.5 * l2 * float(weights @ weights)

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    fitted = parameters.numpy()
    return float(fitted[0]), fitted[1:] * features.scale


def model_card(report: TrainReport, *, name: str, source: str, is_penalty: bool) -> str:
    """The README.md of a scorer that a user trained."""
    reward = "one minus the score" if is_penalty else "the score"
    return f"""# {name}

A linear scorer over hashed word and character n-grams, trained by quark on `{source}`.
The score of a text lies in (0, 1); the reward is {reward}.

{figures_table(report)}
The license and terms of the data are those of `{source}`. State them here before you pass this scorer on.
"""


def figures_table(report: TrainReport) -> str:
    """The report's figures as a Markdown table."""
    return f"""| held-out figure | value |
| --- | --- |
| texts trained on / held out | {report.num_train:,} / {report.num_held_out:,} |
| share of positives (target >= 0.5) | {report.positive_share:.3f} |
| AUC at target >= 0.5 | {report.auc:.4f} |
| accuracy at 0.5 | {report.accuracy:.4f} |
| Pearson / Spearman correlation | {report.pearson:.4f} / {report.spearman:.4f} |
| weights / file size | {report.num_weights:,} / {report.num_bytes / 1e6:.2f} MB |
"""
