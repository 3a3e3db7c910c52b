"""Loads MODEL_OR_RUN of the command line: a run, a saved policy, or any causal LM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from quark.errors import ConfigError, DataError, RunDirectoryError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quark.config.load import LoadedConfig
    from quark.config.schema import RunConfig
    from quark.generation.base import SamplingConfig
    from quark.generation.transformers_generator import TransformersGenerator
    from quark.models.policy import Policy
    from quark.settings import Settings
    from quark.types import Prompt

_Settings = TypeVar("_Settings", bound="Settings")

BEST, NONE = "best", "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A model ready to answer, and the run that it came from, if any."""

    name: str
    policy: Policy | None
    """None for a model without reward tokens."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    config: RunConfig
    """The run's configuration, or the defaults."""
    is_run: bool

    @property
    def num_quantiles(self) -> int:
        """K; 0 for a model without reward tokens."""
        return 0 if self.policy is None else self.policy.reward_tokens.num_quantiles

    def quantile(self, wanted: str | None) -> int | None:
        """The quantile that ``--quantile`` names; by default the best one, or none for a model without reward tokens.

        Raises:
            ConfigError: it is not ``best``, ``none`` or one of the model's quantiles.
        """
        if wanted is None:
            wanted = BEST if self.num_quantiles else NONE
        if wanted == NONE:
            return None
        if not self.num_quantiles:
            raise ConfigError(
                f"--quantile {wanted}: {self.name} has no reward tokens, use --quantile none"
            )
        if wanted == BEST:
            return self.num_quantiles - 1
        if wanted.isascii() and wanted.isdigit() and int(wanted) < self.num_quantiles:
            return int(wanted)
        raise ConfigError(
            f"--quantile {wanted}: give best, none or a number from 0 (worst) to {self.num_quantiles - 1}"
        )

    def generator(self, sampling: SamplingConfig) -> TransformersGenerator:
        """A generator that never samples reward tokens."""
        from quark.generation.transformers_generator import TransformersGenerator

        return TransformersGenerator(
            self.model if self.policy is None else self.policy,
            self.tokenizer,
            None if self.policy is None else self.policy.reward_tokens,
            sampling,
            self.device,
        )

    def prompts_of(self, file: Path) -> list[Prompt]:
        """All prompts of a file, in order and whole: the model reports a prompt that is too long for it.

        Raises:
            FileNotFoundError: no such file.
            DataError: names the file and the row.
        """
        from quark.data.prompts import read_prompts

        field = self.config.prompts.field
        prompts = read_prompts(str(file), field, self.tokenizer, said_by="--prompts")
        return [self.checked(prompt) for prompt in prompts]

    def checked(self, prompt: Prompt) -> Prompt:
        """``prompt``, if the model can continue it.

        Raises:
            DataError: it has no tokens, or one of them is a reward token.
        """
        if not prompt.token_ids:
            raise DataError("an empty prompt: the model needs at least one token to continue")
        tokens = () if self.policy is None else self.policy.reward_tokens.ids
        if set(prompt.token_ids) & set(tokens):
            raise DataError(
                f"the prompt {prompt.text!r} has a reward token in it: ask with --quantile instead"
            )
        return prompt


def _runs_like(folder: Path) -> list[str]:
    """The names of at most three runs beside ``folder``, the most similar first."""
    from difflib import get_close_matches

    from quark.run_directory import RunDirectory

    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    runs = [path.name for path in beside if RunDirectory(path).is_run()]
    return get_close_matches(folder.name, runs, n=3, cutoff=0.0)


def overridden(settings: _Settings, values: Mapping[str, object]) -> _Settings:
    """``settings`` with some values of it, or of its sections, replaced and checked.

    Raises:
        ConfigError: a value does not fit; names its key.
    """
    from pydantic import ValidationError

    from quark.settings import misfits

    replaced = settings.model_dump()
    for key, value in values.items():
        replaced[key] = replaced[key] | value if isinstance(value, dict) else value
    try:
        return type(settings).model_validate(replaced)
    except ValidationError as err:
        raise ConfigError("\n".join(str(misfit) for misfit in misfits(err))) from err


def open_model(name: str, *, exactly: bool = False) -> TrainedModel:
    """Load ``name``: a run directory, a folder that quark saved, or any value of ``model.name``.

    Args:
        name: of the model or run.
        exactly: compute bit for bit as the run did: adapters are not merged into the weights.

    Raises:
        RunDirectoryError: a run that has no finished model yet.
        UnsafeFileError: the run or the model folder has a link that leads out of it.
        ModelError: the model cannot be loaded.
    """
    from quark.config.load import load_config
    from quark.models.loading import (
        check_padding,
        load_base_model,
        load_saved_policy,
        load_tokenizer,
    )
    from quark.models.reward_tokens import REWARD_TOKENS_FILE
    from quark.run_directory import RunDirectory
    from quark.training.factories import trained_policy
    from quark.training.processes.devices import choose_device

    folder, run = Path(name), RunDirectory(Path(name))
    loaded: LoadedConfig = load_config(run.own(run.config) if run.is_run() else None)
    device = choose_device(loaded.config.run.device)
    if run.is_run():
        if not (run.own(run.model) / REWARD_TOKENS_FILE).is_file():
            raise RunDirectoryError(
                f"{name} has no finished model yet: `quark train` on it resumes the run"
            )
        folder = run.model
    elif "/" in name and not folder.exists() and (runs := _runs_like(folder)):
        raise RunDirectoryError(f"there is no run {name}; {folder.parent} has {', '.join(runs)}")
    if (folder / REWARD_TOKENS_FILE).is_file():
        if run.is_run() and exactly:
            policy = trained_policy(loaded.config, run, device)
        else:
            policy = load_saved_policy(folder, device=device)
        return TrainedModel(
            name=name,
            policy=policy,
            model=policy.model,
            tokenizer=policy.tokenizer,
            device=device,
            config=loaded.config,
            is_run=run.is_run(),
        )
    config = loaded.config.model.model_copy(update={"name": name})
    tokenizer = load_tokenizer(config)
    model = load_base_model(config, device=device)
    check_padding(model, tokenizer)
    return TrainedModel(
        name=name,
        policy=None,
        model=model,
        tokenizer=tokenizer,
        device=device,
        config=loaded.config,
        is_run=False,
    )
