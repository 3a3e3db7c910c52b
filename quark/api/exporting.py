"""Writes a run's model to a folder of its own: what `quark model export` and `Run.export` share."""

from __future__ import annotations

from pathlib import Path

from quark.api.cards import card_of
from quark.api.trained_model import TrainedModel
from quark.errors import ConfigError
from quark.publication import publishing_directory
from quark.run_directory import RunDirectory


def export_model(source: TrainedModel, folder: Path, *, license: str | None = None) -> Path:
    """Write the model with its reward tokens and its card; adapters are merged into the weights.

    Args:
        source: a model with reward tokens.
        folder: nothing may be there; its parent exists.
        license: for the card of a run's model; None is that of the original model.

    Returns:
        The folder, which plain transformers loads.

    Raises:
        ConfigError: the model has no reward tokens, or something is at ``folder``.
        FileNotFoundError: there is no folder to put it in.
    """
    if source.policy is None:
        raise ConfigError(f"{source.name} has no reward tokens: only a trained model is exported")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no directory {folder.parent}")
    if folder.exists():
        raise ConfigError(f"{folder} exists: give another name")
    with publishing_directory(folder) as staged:
        source.policy.save(staged, max_new_tokens=source.config.sampling.max_new_tokens)
        if source.is_run:
            run = RunDirectory(Path(source.name))
            card = card_of(run, license=license, step=source.checkpoint_step)
            (staged / "README.md").write_text(card, encoding="utf-8")
    return folder
