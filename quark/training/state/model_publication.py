"""Publishes the trained model with its card: writes a folder beside it and swaps it in."""

from __future__ import annotations

from safetensors import SafetensorError

from quark.config.schema import RunConfig
from quark.errors import CheckpointError
from quark.models.policy import Policy
from quark.publication import publishing_directory
from quark.refusals import way_on
from quark.run_directory import RunDirectory
from quark.training.events import TrainingResult
from quark.training.state.model_card import card_section


def publish_model(
    run: RunDirectory, policy: Policy, config: RunConfig, result: TrainingResult
) -> None:
    """Write ``policy`` to ``run.model``. The folder is always the complete old one or the complete new one.

    Raises:
        CheckpointError: a disk operation failed.
    """
    final = run.model
    try:
        with publishing_directory(final, is_replacing=True) as staged:
            policy.save(staged, max_new_tokens=config.sampling.max_new_tokens)
            with (staged / "README.md").open("a", encoding="utf-8") as card:
                card.write(card_section(config, result))
    except (OSError, SafetensorError) as err:
        raise CheckpointError(
            f"cannot save the model {final}: {err}. The last checkpoint is good; {way_on(err)} to finish"
        ) from err
