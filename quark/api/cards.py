"""The card of a run's model, with the license of the model that it was trained from."""

from __future__ import annotations

import re
from pathlib import Path

from quark.assets import asset_path
from quark.config.grants import Grants
from quark.config.load import load_config
from quark.config.reach import reaches
from quark.errors import ConfigError
from quark.report.load import load_run
from quark.report.markdown import model_card
from quark.run_directory import RunDirectory
from quark.safe_files import read_text

_EMBEDDED = "embedded:"


def card_of(run: RunDirectory, *, license: str | None = None, step: int | None = None) -> str:
    """The card as it is now: with the newest figures, and the frontier if it was measured.

    Args:
        run: that made the model.
        license: identifier on the Hub; None takes that of the original model's card, if it lies on this machine.
        step: of the checkpoint that the weights are of; None for the finished model.

    Raises:
        ConfigError: ``license`` is no identifier.
        RunDirectoryError: the run is damaged.
    """
    data = load_run(run.path)
    license = license or license_for(run)
    try:
        card = model_card(data, license=license)
    except ValueError as err:
        raise ConfigError(f"--license: {err}") from err
    if step is not None:
        card += f"The weights are those of optimizer step {step}; the figures are the newest of the run.\n"
    return card


def license_for(run: RunDirectory) -> str | None:
    """The license of the model that a run was trained from; None where it is not known.

    A model that the user has not allowed is not looked at: the configuration may be a stranger's.
    """
    config = load_config(run.own(run.config)).config
    grants = Grants(run.path)
    is_allowed = all(map(grants.has, reaches(config, run.path, sections=("model",))))
    return license_of(config.model.name) if is_allowed else None


def license_of(model: str) -> str | None:
    """The license that the card of a model on this machine names; None where it is not known."""
    folder = Path(model).expanduser()
    try:
        if model.startswith(_EMBEDDED):
            folder = asset_path("models", model.removeprefix(_EMBEDDED))
        text = read_text(folder / "README.md", folder)
    except (OSError, ValueError):
        return None
    front = text.split("---")[1] if text.startswith("---") and text.count("---") > 1 else ""
    found = re.search(r"^license:\s*([a-z0-9][a-z0-9.-]{0,40})\s*$", front, flags=re.MULTILINE)
    return found[1] if found else None
