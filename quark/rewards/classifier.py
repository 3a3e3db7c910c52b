"""Any Hugging Face sequence classifier as a reward: the probability or logit of one label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import Field, ValidationError

from quark.errors import RewardError, UnsafeFileError
from quark.rewards.source_files import hashes
from quark.safe_files import read_text
from quark.settings import Settings, misfits
from quark.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLASSIFIER_FORMAT: Final = "quark-classifier-scorer-1"

_UNLIMITED = 100_000
_DEFAULT_MAX_LENGTH = 512
_CONTENT = frozenset({".safetensors", ".json", ".txt", ".model"})
"""Kinds of files in a model's folder that are read: weights, settings, vocabularies."""


class ClassifierConfig(Settings):
    """The classifier and the label."""

    model: str = ""
    """Folder or hub name of a sequence classifier with safetensors weights."""
    revision: str | None = None
    """Commit, tag or branch on the hub; name a commit to always get the same model."""
    label: str | int | None = None
    """Name or index of the label that is the reward; optional if there is only one."""
    output: Literal["probability", "logit"] = "probability"
    """Logits have no ceiling, so they still rank where probabilities are all close to 1."""
    batch_size: int = Field(default=32, ge=1)
    """Texts in one forward pass."""
    max_length: int | None = Field(default=None, ge=1)
    """Longer texts are cut, in tokens; default: the tokenizer's limit, at most 512 if it has
    none."""
    device: str = "auto"
    """``auto`` takes a GPU if there is one; or a torch device such as ``cpu`` or ``cuda:1``."""


class ClassifierScorerSettings(Settings):
    """The contents of ``scorer.json`` in the folder of a classifier that quark trained."""

    format: str = CLASSIFIER_FORMAT
    """Names the kind of scorer; another value is refused."""
    name: str
    """Name of the reward."""
    label: str
    """Label whose probability is the reward."""
    data_sha256: str = ""
    """SHA-256 of the file that it was trained on."""


class ClassifierReward:
    """Scores texts with a classifier; texts without a single token are not scored."""

    name: Final = "classifier"

    def __init__(self, config: ClassifierConfig) -> None:
        """Load the classifier. Pickled weights and code from the model's folder are refused.

        Raises:
            RewardError: It cannot be loaded, or it has no such label.
            UnsafeFileError: A link leads out of its folder.
        """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from quark.models.folders import (
            check_configuration,
            check_folder,
            check_repository,
            commit_of,
            offline,
        )

        if not config.model:
            raise RewardError("reward classifier needs reward.classifier.model")
        folder = Path(config.model)
        is_local = folder.is_dir()
        revision = config.revision
        try:
            if is_local:
                check_folder(folder)
            else:
                revision = commit_of(config.model, config.revision)
                check_repository(config.model, revision=revision)
            with offline() if is_local else nullcontext():
                check_configuration(config.model, revision=revision, is_local=is_local)
                self._tokenizer = AutoTokenizer.from_pretrained(
                    config.model, revision=revision, local_files_only=is_local
                )
                model, found = AutoModelForSequenceClassification.from_pretrained(
                    config.model,
                    revision=revision,
                    # Not on the branch as it is now.
                    adapter_kwargs={"revision": revision},
                    use_safetensors=True,
                    dtype=torch.float32,
                    local_files_only=is_local,
                    output_loading_info=True,
                )
        except UnsafeFileError:
            raise
        except (
            Exception
        ) as err:  # transformers raises what a configuration of wrong types makes it raise
            raise RewardError(f"cannot load the classifier {config.model!r}: {err}") from err
        if missing := sorted(found["missing_keys"]):
            raise RewardError(
                f"{config.model!r} is no trained classifier: its weights lack {', '.join(missing[:3])}. Train one with "
                "`quark reward train --kind classifier`"
            )
        self._config = config
        self._files = {"commit": revision or ""} if not is_local else _content(folder)
        self._label_index = _label_index(model.config, config)
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        self._model = model.to(self._device).eval()
        self._is_multi_label = (
            model.config.num_labels == 1
            or model.config.problem_type == "multi_label_classification"
        )
        ready_to_pad(self._model, self._tokenizer, config.model)
        limit = self._tokenizer.model_max_length
        self._max_length = config.max_length or (
            limit if limit < _UNLIMITED else _DEFAULT_MAX_LENGTH
        )

    @property
    def provenance(self) -> Mapping[str, Json]:
        """The identity of the classifier, and the part of its output that is the score."""
        settings = self._config.model_dump(mode="json", exclude={"batch_size", "device"})
        return {**settings, "files": dict(self._files)}

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str]
    ) -> Sequence[float | None]:
        """Score the completions without their prompts, truncated to the maximum length; None for one without tokens."""
        del prompts
        encoded = self._tokenizer(list(completions), truncation=True, max_length=self._max_length)[
            "input_ids"
        ]
        scores: list[float | None] = [None] * len(completions)
        # Texts of like length share a batch, which saves most of the padding.
        order = sorted(
            (row for row, ids in enumerate(encoded) if ids), key=lambda row: len(encoded[row])
        )
        for start in range(0, len(order), self._config.batch_size):
            rows = order[start : start + self._config.batch_size]
            for row, value in zip(rows, self._forward([encoded[row] for row in rows]), strict=True):
                scores[row] = value
        return scores

    def _forward(self, ids: list[list[int]]) -> list[float]:
        import torch

        inputs = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            logits = self._model(**inputs).logits.float()
        if self._config.output == "logit":
            values = logits
        elif self._is_multi_label:
            values = logits.sigmoid()
        else:
            values = logits.softmax(dim=-1)
        column: list[float] = values[:, self._label_index].tolist()
        return column


class TrainedClassifier:
    """The reward of a folder that ``quark reward train --kind classifier`` wrote."""

    def __init__(self, folder: Path, config: ClassifierConfig) -> None:
        """Load the classifier in ``folder``; batch size and device are those of ``config``.

        Raises:
            RewardError: It cannot be loaded, or is not of this format.
            UnsafeFileError: A link leads out of the folder.
        """
        from quark.rewards.linear import SETTINGS_FILE

        try:
            self._settings = ClassifierScorerSettings.model_validate_json(
                read_text(folder / SETTINGS_FILE, folder)
            )
        except ValidationError as err:
            problems = "; ".join(str(misfit) for misfit in misfits(err))
            raise RewardError(f"{folder / SETTINGS_FILE}: {problems}") from err
        self._reward = ClassifierReward(
            ClassifierConfig(
                model=str(folder),
                label=self._settings.label,
                batch_size=config.batch_size,
                device=config.device,
            )
        )

    @property
    def name(self) -> str:
        """The name in the scorer's settings."""
        return self._settings.name

    @property
    def provenance(self) -> Mapping[str, Json]:
        """The folder, the label, and the hashes of all files that determine the scores."""
        return self._reward.provenance

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str]
    ) -> Sequence[float | None]:
        """Score the completions without their prompts; None for one without tokens."""
        return self._reward(prompts=prompts, completions=completions)


def ready_to_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make sure that both know a token to pad with; the end-of-sequence token serves where there is none.

    Raises:
        RewardError: The tokenizer has neither; ``name`` is what the message calls it.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise RewardError(f"the tokenizer of {name!r} has no token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def _content(folder: Path) -> Mapping[str, str]:
    """SHA-256 of the files in a folder that determine the scores."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _CONTENT)
    return hashes(files, folder)


def _label_index(model_config: object, config: ClassifierConfig) -> int:
    names: dict[int, str] = getattr(model_config, "id2label", {})
    shown = ", ".join(f"{index} = {name}" for index, name in sorted(names.items()))
    if config.label is None:
        if len(names) == 1:
            return 0
        raise RewardError(f"reward.classifier.label: choose one of {config.model!r}: {shown}")
    for index, name in names.items():
        if config.label in (index, name):
            return index
    raise RewardError(f"reward.classifier.label: {config.model!r} has no {config.label!r}; {shown}")
