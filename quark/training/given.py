"""Objects that a Python call passes to a run, and their copies in the run directory.

Prompts and a model are written to the run directory under a name from their content. The configuration refers to that
name, so the run can be resumed, evaluated and moved without the objects. A reward stays an object.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quark.data.columns import columns_of, json_lines
from quark.errors import DataError, ModelError, RunDirectoryError
from quark.models.progress import without_progress_bars
from quark.publication import publish_file, publishing_directory
from quark.refusals import way_on
from quark.rewards.given import GivenReward
from quark.run_directory import RunDirectory

_DIGITS = 16
"""Number of digits of a digest in a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenModel:
    """A loaded model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """``model-`` and a digest of weights, configuration and tokenizer."""

    @classmethod
    def of(cls, model: object, tokenizer: object) -> Self:
        """Check and name them.

        Raises:
            ModelError: they are not a plain model and tokenizer of transformers.
        """
        if not isinstance(model, PreTrainedModel):
            hint = ": merge its adapters first" if hasattr(model, "merge_and_unload") else ""
            raise ModelError(f"the model is {type(model).__name__}, not a PreTrainedModel{hint}")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ModelError(
                "a loaded model needs its tokenizer, too: quark.train(..., model=(model, tokenizer))"
            )
        digest = hashlib.sha256(model.config.to_json_string().encode())
        digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
        name = f"model-{digest.hexdigest()[:_DIGITS]}"
        return cls(model=model, tokenizer=tokenizer, name=name)

    def write(self, folder: Path) -> None:
        """Save both as one model folder, all or nothing."""
        with publishing_directory(folder) as staged, without_progress_bars():
            self.model.save_pretrained(staged)
            self.tokenizer.save_pretrained(staged)


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenPrompts:
    """Prompts as the text of a JSON-lines file."""

    text: str

    @classmethod
    def of(cls, data: object) -> Self:
        """The prompts of a list, frame or data set.

        Raises:
            DataError: it is none of these.
        """
        text = json_lines(columns_of(data, text_column="prompt"))
        if not text:
            raise DataError("the list of prompts is empty")
        return cls(text=text)

    @property
    def name(self) -> str:
        """``prompts-`` and a digest."""
        return f"prompts-{hashlib.sha256(self.text.encode()).hexdigest()[:_DIGITS]}.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The objects of a call; None if the configuration has a name instead."""

    reward: GivenReward | None = None
    prompts: GivenPrompts | None = None
    model: GivenModel | None = None

    def table(self, run: RunDirectory) -> dict[str, dict[str, Any]]:
        """The values of the configuration that refer to the objects."""
        found: dict[str, dict[str, Any]] = {}
        if self.reward is not None:
            found["reward"] = {"name": self.reward.setting}
        if self.prompts is not None:
            found["prompts"] = {"source": str(run.given.absolute() / self.prompts.name)}
        if self.model is not None:
            found["model"] = {"name": str(run.given.absolute() / self.model.name)}
        return found

    def keep(self, run: RunDirectory) -> None:
        """Write prompts and model to the run, unless it has them.

        Raises:
            RunDirectoryError: a disk operation failed.
        """
        if self.prompts is None and self.model is None:
            return
        with _refusals(run):
            run.given.mkdir(exist_ok=True)
            if self.prompts is not None and not (run.given / self.prompts.name).exists():
                publish_file(run.given / self.prompts.name, self.prompts.text)
            if self.model is not None and not (run.given / self.model.name).exists():
                self.model.write(run.given / self.model.name)


@contextmanager
def _refusals(run: RunDirectory) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise RunDirectoryError(f"cannot write {run.given}: {err}; {way_on(err)}") from err
