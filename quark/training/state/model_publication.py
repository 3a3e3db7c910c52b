"""The trained model is written beside its place and swapped in, with a card that tells of the run."""

from __future__ import annotations

import contextlib
import shutil

from safetensors import SafetensorError

from quark.config.schema import RunConfig
from quark.errors import CheckpointError
from quark.models.policy import Policy
from quark.pool.native import publish_directory
from quark.refusals import way_on
from quark.run_directory import RunDirectory
from quark.training.events import TrainingResult
from quark.training.state.model_card import card_section


def publish_model(
    run: RunDirectory, policy: Policy, config: RunConfig, result: TrainingResult
) -> None:
    """Write ``policy`` to ``run.model``. The folder is the old one or the new one, never a part of either.

    Raises:
        CheckpointError: the disk refused.
    """
    final = run.model
    staged = final.with_name("model.partial")
    previous = final.with_name("model.previous")
    try:
        for leftover in (staged, previous):
            shutil.rmtree(leftover, ignore_errors=True)
        policy.save(staged, max_new_tokens=config.sampling.max_new_tokens)
        with (staged / "README.md").open("a", encoding="utf-8") as card:
            card.write(card_section(config, result))
        if final.exists():
            final.rename(previous)
        publish_directory(staged, final)
    except (OSError, SafetensorError) as err:
        shutil.rmtree(staged, ignore_errors=True)
        if previous.exists() and not final.exists():
            with contextlib.suppress(OSError):
                previous.rename(final)
        raise CheckpointError(
            f"cannot save the model {final}: {err}. The last checkpoint is good; {way_on(err)} to finish"
        ) from err
    shutil.rmtree(previous, ignore_errors=True)
