"""Loads what is to be used: a run, a saved policy, or any causal LM."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from os.path import lexists
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quark.api.trust import check_reach, may_reach
from quark.config.load import LoadedConfig, load_config
from quark.config.schema import RunConfig
from quark.data.prompts import read_prompts
from quark.errors import ConfigError, DataError, RunDirectoryError
from quark.evaluation.frontier_file import FrontierFile
from quark.generation.base import SamplingConfig
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.loading import (
    check_padding,
    load_base_model,
    load_saved_policy,
    load_tokenizer,
)
from quark.models.policy import Policy
from quark.models.reward_tokens import REWARD_TOKENS_FILE
from quark.models.token_critic import DEFAULT_STRENGTH
from quark.run_directory import RunDirectory
from quark.settings import Settings, misfits
from quark.training.factories import checkpointed_policy, trained_policy
from quark.training.processes.devices import choose_device
from quark.training.state.checkpoint import LAST
from quark.types import Completion, Prompt

_Settings = TypeVar("_Settings", bound=Settings)

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
    checkpoint_step: int | None = None
    """The step of the checkpoint that the weights are of; None for a finished model."""

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
        return TransformersGenerator(
            self.model if self.policy is None else self.policy,
            self.tokenizer,
            None if self.policy is None else self.policy.reward_tokens,
            sampling,
            self.device,
        )

    def generate(
        self,
        prompts: str | Sequence[str | Prompt],
        *,
        quantile: str | int | None = None,
        num: int = 1,
        seed: int = 0,
        **sampling: float | None,
    ) -> list[Completion]:
        """Write completions under a reward token.

        Args:
            prompts: one text, or several.
            quantile: ``best``, ``none``, or a number from 0 (worst) to K-1. None is the best one, or none for a model
                without reward tokens.
            num: completions of each prompt.
            seed: the same seed gives the same text.
            **sampling: settings such as ``max_new_tokens``, ``temperature``, ``top_p`` and ``guidance``; what is left
                out, or None, is as in the run.

        Returns:
            ``num`` completions of each prompt in order, each with its ``prompt``, ``text`` and log-probabilities.

        Raises:
            ConfigError: a quantile or a setting does not fit.
            DataError: a prompt is empty or has a reward token in it.
        """
        settings, asked = self.asked(quantile, **sampling)
        texts = [prompts] if isinstance(prompts, str) else prompts
        asking = [
            self.prompt(text, index) if isinstance(text, str) else text
            for index, text in enumerate(texts)
        ]
        repeated = [prompt for prompt in asking for _ in range(num)]
        return self.generator(settings).generate(repeated, quantile=asked, seed=seed)

    def asked(
        self, quantile: str | int | None, **sampling: float | None
    ) -> tuple[SamplingConfig, int | None]:
        """The sampling settings and the quantile of a ``generate`` with these arguments."""
        given = {key: value for key, value in sampling.items() if value is not None}
        if "guidance" not in given and self.is_run:
            picked = _picked_guidance(RunDirectory(Path(self.name)))
            given |= {} if picked is None else {"guidance": picked}
        wanted = None if quantile is None else str(quantile)
        return overridden(self.config.sampling, given), self.quantile(wanted)

    def prompt(self, text: str, index: int = 0) -> Prompt:
        """A text as a prompt of this model.

        Raises:
            DataError: it is not valid Unicode, is empty, or has a reward token in it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as err:
            raise DataError(f"the prompt {text!r} is not UTF-8") from err
        token_ids = tuple(self.tokenizer.encode(text))
        return self.checked(Prompt(index=index, text=text, token_ids=token_ids))

    def prompts_of(self, file: Path) -> list[Prompt]:
        """All prompts of a file, in order and whole: the model reports a prompt that is too long for it.

        Raises:
            FileNotFoundError: no such file.
            DataError: names the file and the row.
        """
        field = self.config.prompts.field
        prompts = read_prompts(str(file), field, self.tokenizer, said_by="--prompts")
        return [self.checked(prompt) for prompt in prompts]

    def in_its_tokens(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The same texts as tokens of this model, in order.

        Raises:
            DataError: one has no tokens here, or a reward token.
        """
        encoded = [tuple(self.tokenizer.encode(prompt.text)) for prompt in prompts]
        return [
            self.checked(replace(prompt, token_ids=ids))
            for prompt, ids in zip(prompts, encoded, strict=True)
        ]

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


def _picked_guidance(run: RunDirectory) -> float | None:
    """The strength that `quark frontier --pick` stored in a run; None without one."""
    kept = FrontierFile.read(run)
    return None if kept is None else kept.picked


def _at_checkpoint(
    name: str,
    run: RunDirectory,
    config: RunConfig,
    device: torch.device,
    checkpoint: str,
    allow: Collection[str],
) -> TrainedModel:
    # The original model is the one that the configuration names: it may be a stranger's.
    check_reach(config, run.path, sections=("model",), named=(), allow=allow)
    policy, step = checkpointed_policy(config, run, device, checkpoint)
    return TrainedModel(
        name=name,
        policy=policy,
        model=policy.model,
        tokenizer=policy.tokenizer,
        device=device,
        config=config,
        is_run=True,
        checkpoint_step=step,
    )


def _runs_like(folder: Path) -> list[str]:
    """The names of at most three runs beside ``folder``, the most similar first."""
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    runs = [path.name for path in beside if RunDirectory(path).is_run()]
    return get_close_matches(folder.name, runs, n=3, cutoff=0.0)


def say_checkpoint(source: TrainedModel, tell: Callable[[str], object]) -> None:
    """Tell which checkpoint a model is of, if it is of one."""
    if source.checkpoint_step is not None:
        tell(f"weights of the checkpoint of step {source.checkpoint_step}")


def overridden(settings: _Settings, values: Mapping[str, object]) -> _Settings:
    """``settings`` with some values of it, or of its sections, replaced and checked.

    Raises:
        ConfigError: a value does not fit; names its key.
    """
    replaced = settings.model_dump()
    for key, value in values.items():
        replaced[key] = replaced[key] | value if isinstance(value, dict) else value
    try:
        return type(settings).model_validate(replaced)
    except ValidationError as err:
        raise ConfigError("\n".join(str(misfit) for misfit in misfits(err))) from err


def open_model(
    name: str,
    *,
    exactly: bool = False,
    checkpoint: str | None = None,
    allow: Collection[str] = (),
) -> TrainedModel:
    """Load ``name``: a run directory, a folder that quark saved, or any value of ``model.name``.

    Args:
        name: of the model or run.
        exactly: compute bit for bit as the run did: adapters are not merged into the weights, if the user allows the
            original model that the run names.
        checkpoint: of the run: ``best``, ``last`` or a step. None is the finished model, or the last checkpoint of a
            run that has not finished.
        allow: what the run's configuration may reach, where a checkpoint or its adapters need the original model.

    Raises:
        ConfigError: a checkpoint of something that is not a run; or the user has not allowed what is reached.
        CheckpointError: there is no such checkpoint.
        RunDirectoryError: a run that has neither a model nor a checkpoint.
        UnsafeFileError: the run or the model folder has a link that leads out of it.
        ModelError: the model cannot be loaded.
    """
    folder, run = Path(name), RunDirectory(Path(name))
    loaded: LoadedConfig = load_config(run.own(run.config) if run.is_run() else None)
    device = choose_device(loaded.config.run.device)
    if checkpoint is not None and not run.is_run():
        raise ConfigError(f"{name} is not a run directory, so it has no checkpoint {checkpoint}")
    if run.is_run():
        # A run without a finished model answers with its last checkpoint. Something else in the file's place does not.
        if not lexists(run.own(run.model) / REWARD_TOKENS_FILE) and checkpoint is None:
            checkpoint = LAST
            if not any(run.own(run.checkpoints).glob("step-*")):
                raise RunDirectoryError(
                    f"{name} has no checkpoint yet: `quark train {name}` resumes the run"
                )
        if checkpoint is not None:
            return _at_checkpoint(name, run, loaded.config, device, checkpoint, allow)
        folder = run.model
    elif "/" in name and not folder.exists() and (runs := _runs_like(folder)):
        raise RunDirectoryError(f"there is no run {name}; {folder.parent} has {', '.join(runs)}")
    if run.is_run() or (folder / REWARD_TOKENS_FILE).is_file():
        if run.is_run() and exactly:
            # Adapters lie on the original model, which the configuration names: it may be a stranger's.
            may_load = may_reach(loaded.config, run.path, sections=("model",), allow=allow)
            policy = trained_policy(loaded.config, run, device, is_merged=not may_load)
        else:
            policy = load_saved_policy(folder, device=device)
        config = loaded.config
        if not (run.is_run() or policy.reward_tokens.are_placed):
            # No run says how it is steered, and only the critic tells its quantiles apart.
            steered = {"guide": "critic", "guidance": DEFAULT_STRENGTH}
            config = overridden(config, {"sampling": steered})
        return TrainedModel(
            name=name,
            policy=policy,
            model=policy.model,
            tokenizer=policy.tokenizer,
            device=device,
            config=config,
            is_run=run.is_run(),
        )
    original = loaded.config.model.model_copy(update={"name": name})
    tokenizer = load_tokenizer(original)
    model = load_base_model(original, device=device)
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
