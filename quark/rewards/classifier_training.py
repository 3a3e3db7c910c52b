"""Fine-tuning of a small sequence classifier on labeled texts, for use as a reward.

An encoder of any kind that transformers loads gets a new head with two labels, and both are fitted to the targets by
cross-entropy. Targets are labels 0 and 1 or scores in [0, 1], so the probability of the second label is a calibrated
probability or the expected score. The result is an ordinary model folder of transformers, with a ``scorer.json`` that
says which label is the reward.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from quark.errors import RewardError
from quark.models.config import ModelConfig
from quark.models.loading import load_new_classifier
from quark.models.progress import without_progress_bars
from quark.publication import publishing_directory
from quark.rewards.classifier import ClassifierScorerSettings, ready_to_pad
from quark.rewards.held_out_report import HeldOutReport, held_out_figures
from quark.rewards.linear import SETTINGS_FILE
from quark.rewards.linear_training import (
    LabelledText,
    check_examples,
    read_labelled_texts,
    split_by_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TEXT_BYTES = 1 << 20
"""Of a labeled text."""
_WEIGHT_DECAY = 0.01
_WARMUP_SHARE = 0.06
_MAX_GRAD_NORM = 1.0
_BATCHES_SORTED = 32
"""Batches whose texts are sorted by length together, which saves most of the padding."""
_NUM_BINS = 10
_SCORED_AT_ONCE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierTraining:
    """How a classifier is trained."""

    encoder: str = "embedded:reviews"
    """Model that gets the new head: any value of ``model.name``."""
    is_frozen: bool = False
    """Train the head, and a pooling layer where the model has one, and leave the encoder as it is."""
    epochs: int = 3
    learning_rate: float = 5e-4
    """The highest; it grows over the first 6 % of the steps and falls to 0."""
    batch_size: int = 32
    max_length: int = 128
    """Longer texts are cut, in tokens; at most what the model can read."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How well probabilities agree with what happens, on N held-out texts."""

    error: float
    """Expected calibration error: mean over the texts of |mean probability - mean target| of the text's bin, of 10
    equally wide ones."""
    brier: float
    """Mean squared difference between probability and target."""
    bins: tuple[tuple[float, float, int], ...]
    """Mean probability, mean target and number of texts of each bin that has any."""

    @classmethod
    def of(cls, scores: NDArray[np.float64], targets: NDArray[np.float64]) -> Calibration:
        """Of probabilities [N] against targets [N] in [0, 1]; NaN without texts."""
        if not len(scores):
            return cls(error=math.nan, brier=math.nan, bins=())
        places = np.minimum((scores * _NUM_BINS).astype(int), _NUM_BINS - 1)
        bins = tuple(
            (float(scores[chosen].mean()), float(targets[chosen].mean()), int(chosen.sum()))
            for chosen in (places == k for k in range(_NUM_BINS))
            if chosen.any()
        )
        return cls(
            error=sum(count * abs(said - was) for said, was, count in bins) / len(scores),
            brier=float(np.mean((scores - targets) ** 2)),
            bins=bins,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierReport(HeldOutReport):
    """The result of a training of a classifier."""

    encoder: str
    calibration: Calibration
    num_parameters: int
    num_trained: int
    """Of these, the parameters that were trained."""
    data_sha256: str
    seconds: float


def train_classifier(
    data: Path,
    folder: Path,
    training: ClassifierTraining,
    *,
    name: str | None = None,
    text_field: str = "text",
    target_field: str | None = None,
    is_penalty: bool = False,
    held_out_fraction: float = 0.1,
    on_progress: Callable[[str], None] | None = None,
) -> ClassifierReport:
    """Train on a JSONL file and write the classifier with its model card into ``folder``.

    Arguments, the held-out part and ``DataError`` as in ``train_linear_scorer``. Texts without a token are left out.

    Raises:
        DataError: The data does not fit.
        ModelError: The encoder cannot be loaded, or transformers has no classifier of its kind.
        RewardError: The loss is no longer finite.
    """
    started = time.perf_counter()
    tell = on_progress or (lambda _: None)
    examples = read_labelled_texts(
        data, text_field=text_field, target_field=target_field, max_text_bytes=MAX_TEXT_BYTES
    )
    name = name or folder.name
    labels = (f"not {name}", name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tell(f"loading {training.encoder}")
    model, tokenizer = load_new_classifier(
        ModelConfig(name=training.encoder), labels, seed=training.seed
    )
    model.to(device)
    tokenizer.model_max_length = min(
        training.max_length, tokenizer.model_max_length, _longest(model)
    )
    ready_to_pad(model, tokenizer, training.encoder)
    train, held_out = split_by_text(_with_tokens(examples, tokenizer, tell), held_out_fraction)
    check_examples(train, held_out, data.name)
    num_trained = _freeze(model) if training.is_frozen else model.num_parameters()
    _fit(model, tokenizer, train, training, tell)
    tell(f"scoring {len(held_out):,} held-out texts")
    scores = _probabilities(model, tokenizer, [example.text for example in held_out])
    truth = np.array([example.target for example in held_out])
    report = ClassifierReport(
        folder=folder,
        encoder=training.encoder,
        num_train=len(train),
        **held_out_figures(scores, truth),
        calibration=Calibration.of(scores, truth),
        num_parameters=model.num_parameters(),
        num_trained=num_trained,
        data_sha256=hashlib.sha256(data.read_bytes()).hexdigest(),
        seconds=time.perf_counter() - started,
    )
    settings = ClassifierScorerSettings(
        name=name, label=labels[0] if is_penalty else labels[1], data_sha256=report.data_sha256
    )
    with publishing_directory(folder, is_replacing=True) as staged, without_progress_bars():
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        (staged / SETTINGS_FILE).write_text(
            settings.model_dump_json(indent=2) + "\n", encoding="utf-8"
        )
        (staged / "README.md").write_text(
            classifier_card(report, name=name, source=data.name, is_penalty=is_penalty),
            encoding="utf-8",
        )
    return report


def _longest(model: PreTrainedModel) -> int:
    """Tokens that the model can read at once."""
    limit = getattr(model.config, "max_position_embeddings", None)
    # Some families (RoBERTa) begin to count positions after the id of their pad token.
    return limit - 2 if isinstance(limit, int) else 512


def _with_tokens(
    examples: Sequence[LabelledText],
    tokenizer: PreTrainedTokenizerBase,
    tell: Callable[[str], None],
) -> list[LabelledText]:
    encoded = tokenizer([example.text for example in examples])["input_ids"]
    kept = [example for example, ids in zip(examples, encoded, strict=True) if ids]
    if len(kept) < len(examples):
        tell(f"{len(examples) - len(kept):,} texts have no token and are left out")
    return kept


def _freeze(model: PreTrainedModel) -> int:
    """Leave only what stands on top of the encoder trainable; how many parameters that is."""
    inside = {
        id(parameter)
        for key, parameter in model.base_model.named_parameters()
        if "pooler" not in key
    }
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in inside)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[LabelledText],
    training: ClassifierTraining,
    tell: Callable[[str], None],
) -> None:
    encoded = tokenizer([example.text for example in examples], truncation=True)["input_ids"]
    targets = torch.tensor([example.target for example in examples])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=_WEIGHT_DECAY)
    num_steps = training.epochs * math.ceil(len(examples) / training.batch_size)
    warmup = max(1, int(num_steps * _WARMUP_SHARE))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup)),
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(training.seed)
        model.train()
        for epoch in range(training.epochs):
            total = 0.0
            for rows in _batches([len(ids) for ids in encoded], training, epoch):
                logits = _logits(model, tokenizer, [encoded[row] for row in rows])
                wanted = targets[rows].to(logits.device)
                loss = F.cross_entropy(logits, torch.stack([1 - wanted, wanted], dim=1))
                if not torch.isfinite(loss):
                    raise RewardError(
                        f"the loss is no longer finite in epoch {epoch + 1}: try a lower --learning-rate"
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                torch.nn.utils.clip_grad_norm_(trained, _MAX_GRAD_NORM)
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(rows)
            tell(f"epoch {epoch + 1} of {training.epochs}: loss {total / len(examples):.4f}")
    model.eval()


def _batches(
    lengths: Sequence[int], training: ClassifierTraining, epoch: int
) -> Iterator[list[int]]:
    """Rows of each batch of an epoch: shuffled, with texts of similar length together."""
    rng = np.random.default_rng((training.seed, epoch))
    order = rng.permutation(len(lengths))
    size, most = training.batch_size, training.batch_size * _BATCHES_SORTED
    batches: list[list[int]] = []
    for start in range(0, len(order), most):
        rows = sorted(order[start : start + most].tolist(), key=lengths.__getitem__)
        batches += [rows[i : i + size] for i in range(0, len(rows), size)]
    for place in rng.permutation(len(batches)):
        yield batches[place]


def _logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]
) -> Tensor:
    inputs = tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt").to(model.device)
    logits: Tensor = model(**inputs).logits.float()
    return logits


def _probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> NDArray[np.float64]:
    """[N] of the second label."""
    encoded = tokenizer(list(texts), truncation=True)["input_ids"]
    order = np.argsort([len(ids) for ids in encoded], kind="stable")
    found = np.empty(len(texts))
    with torch.inference_mode():
        for start in range(0, len(order), _SCORED_AT_ONCE):
            rows = order[start : start + _SCORED_AT_ONCE]
            logits = _logits(model, tokenizer, [encoded[row] for row in rows])
            found[rows] = logits.softmax(-1)[:, 1].double().cpu().numpy()
    return found


def classifier_card(report: ClassifierReport, *, name: str, source: str, is_penalty: bool) -> str:
    """The README.md of a classifier that a user trained."""
    reward = f"`not {name}`" if is_penalty else f"`{name}`"
    bins = "\n".join(
        f"| {said:.3f} | {was:.3f} | {count:,} |" for said, was, count in report.calibration.bins
    )
    return f"""---
library_name: transformers
pipeline_tag: text-classification
---

# {name}

A sequence classifier, fine-tuned by quark from `{report.encoder}` on `{source}` (SHA-256 `{report.data_sha256}`). The
reward is the probability of the label {reward}.

| held-out figure | value |
| --- | --- |
| texts trained on / held out | {report.num_train:,} / {report.num_held_out:,} |
| share of positives (target >= 0.5) | {report.positive_share:.3f} |
| AUC at target >= 0.5 | {report.auc:.4f} |
| accuracy at 0.5 | {report.accuracy:.4f} |
| Pearson / Spearman correlation | {report.pearson:.4f} / {report.spearman:.4f} |
| expected calibration error / Brier score | {report.calibration.error:.4f} / {report.calibration.brier:.4f} |
| parameters / trained | {report.num_parameters:,} / {report.num_trained:,} |

Calibration on the held-out texts:

| mean probability | mean target | texts |
| --- | --- | --- |
{bins}

The license and terms are those of `{source}` and of `{report.encoder}`. State them here before you pass this
classifier on.
"""
