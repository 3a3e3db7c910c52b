"""Checks of a run before anything large is loaded."""

from __future__ import annotations

from quark.config.schema import RunConfig
from quark.data.prompts import PromptConfig, check_sources
from quark.errors import ConfigError
from quark.training.loop.trackers import check_trackers
from quark.training.processes.process_group import ProcessGroup


def preflight(config: RunConfig, *, has_given_prompts: bool = False) -> None:
    """Check that the trackers are installed and the prompt files exist, except one that the run will write.

    Raises:
        ConfigError: a tracker's package is not installed.
        FileNotFoundError: a prompt file is missing.
        DataError: a prompt file has an unknown format.
    """
    check_trackers(config.tracking.trackers)
    prompts = config.prompts
    if has_given_prompts:
        prompts = prompts.model_copy(update={"source": PromptConfig().source})
    check_sources(prompts)


def check_processes(config: RunConfig, processes: ProcessGroup) -> None:
    """Check that the configuration can be run by these processes.

    Raises:
        ConfigError: it cannot.
    """
    if processes.is_sharded and config.reference.cache != "off":
        raise ConfigError(
            f'reference.cache = "{config.reference.cache}" with run.parallel = "sharded": one process would need all '
            'weights of the original model whenever a sample is not in the cache. Set reference.cache = "off", or '
            'run.parallel = "data"'
        )
    if processes.is_sharded and config.optimizer.settling_steps:
        raise ConfigError(
            "optimizer.settling_steps moves single rows of the embedding, which sharded weights divide among the "
            'processes: set it to 0, or run.parallel = "data"'
        )
    if processes.is_sharded and config.average.kl_anchor == "ema":
        raise ConfigError(
            'average.kl_anchor = "ema" runs the model around other weights, which sharded processes cannot: set it to '
            '"initial", or run.parallel = "data"'
        )
    if config.optimizer.batch_size < processes.size:
        raise ConfigError(
            f"optimizer.batch_size = {config.optimizer.batch_size} is less than one sample for each of "
            f"{processes.size} processes"
        )
