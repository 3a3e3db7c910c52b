"""Training of several linear scorers that differ in the texts they saw: the members of an ensemble.

A linear scorer has one best fit, whatever its seed, so each member is trained on its own bootstrap sample: as many
texts as there are, drawn with replacement.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from quark.errors import DataError
from quark.formats import VERSION_KEY
from quark.publication import publish_file
from quark.rewards.held_out_report import area_under_roc
from quark.rewards.label_noise import with_label_noise
from quark.rewards.linear import LinearScorer
from quark.rewards.linear_training import (
    TrainReport,
    fit_linear_scorer,
    read_labelled_texts,
    split_by_text,
)
from quark.types import Json

ENSEMBLE_FILE: Final = "ensemble.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleReport:
    """The result of a training; figures are for held-out texts with their true labels."""

    folder: Path
    members: tuple[TrainReport, ...]
    auc_of_mean: float
    """Area under the ROC curve of the members' mean score."""
    label_noise: float
    num_flipped: int
    """Texts that were trained on with a wrong label."""


def train_linear_ensemble(
    data: Path,
    folder: Path,
    *,
    number: int,
    label_noise: float = 0.0,
    seed: int = 0,
    name: str | None = None,
    text_field: str = "text",
    target_field: str | None = None,
    is_penalty: bool = False,
    held_out_fraction: float = 0.1,
    l2: float = 1.0,
    on_progress: Callable[[str], None] | None = None,
) -> EnsembleReport:
    """Train ``number`` scorers on a JSONL file and write them into the folders ``1`` and so on of ``folder``.

    Args:
        data: JSON lines, each with a text and a target.
        folder: of the ensemble; members of an earlier one are replaced.
        number: of members, at least 1.
        label_noise: share of the texts that are trained on with a wrong label, the same ones for all members.
        seed: of the wrong labels and of the bootstrap samples.
        name: of the members, followed by their numbers; the folder's name if not given.
        text_field: the field of the text.
        target_field: the field of the target, as for ``train_linear_scorer``.
        is_penalty: the target is something unwanted.
        held_out_fraction: share of the texts that only the report sees.
        l2: strength of the penalty on the weights.
        on_progress: is told one line at a time what goes on.

    Raises:
        DataError: as ``train_linear_scorer``.
    """
    examples = read_labelled_texts(data, text_field=text_field, target_field=target_field)
    clean, held_out = split_by_text(examples, held_out_fraction)
    train = with_label_noise(clean, label_noise, seed=seed)
    if not train:
        raise DataError(f"{data}: no text is left to train on")
    reports = []
    for member in range(1, number + 1):
        if on_progress is not None:
            on_progress(f"member {member} of {number}")
        random = np.random.default_rng([seed, member])
        drawn = random.integers(len(train), size=len(train))
        reports.append(
            fit_linear_scorer(
                [train[i] for i in drawn],
                held_out,
                folder / str(member),
                name=f"{name or folder.name}-{member}",
                is_penalty=is_penalty,
                l2=l2,
                source=data.name,
                on_progress=on_progress,
            )
        )
    texts = [example.text for example in held_out]
    scores = [LinearScorer.load(report.folder).score_texts(texts) for report in reports]
    mean = np.stack(scores).astype(np.float64).mean(0)
    truth = np.array([example.target for example in held_out])
    said: dict[str, Json] = {
        VERSION_KEY: FORMAT_VERSION,
        "members": [str(member) for member in range(1, number + 1)],
        "label_noise": label_noise,
        "seed": seed,
        "source": data.name,
    }
    publish_file(folder / ENSEMBLE_FILE, json.dumps(said, indent=1) + "\n")
    return EnsembleReport(
        folder=folder,
        members=tuple(reports),
        auc_of_mean=area_under_roc(np.asarray(mean), truth >= 0.5),
        label_noise=label_noise,
        num_flipped=sum(a.target != b.target for a, b in zip(clean, train, strict=True)),
    )
