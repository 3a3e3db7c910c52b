"""What can be found out about a run before anything large is loaded."""

from __future__ import annotations

from quark.config.schema import RunConfig
from quark.data.prompts import check_sources
from quark.training.loop.trackers import check_trackers


def preflight(config: RunConfig) -> None:
    """Check that the trackers are installed and the prompt files are there.

    Raises:
        ConfigError: a tracker's package is not installed.
        FileNotFoundError: a prompt file is missing.
        DataError: a prompt file is of no kind that can be read.
    """
    check_trackers(config.tracking.trackers)
    check_sources(config.prompts)
