"""Reads the samples of Inspect's logs with Inspect's own package."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quark.bounded_files import refuse_expansion
from quark.errors import ConfigError, DataError
from quark.formats import plain_json
from quark.installing import install_command
from quark.interchange.layouts import ForeignSample
from quark.safe_files import MAX_BYTES
from quark.types import FinishReason

_VALUES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
"""Inspect's own numbers for its letters."""


def samples_of_log(file: Path) -> Iterator[tuple[int, ForeignSample | str]]:
    """Every sample of a log with its number, counted from 1, or why it cannot be taken.

    Raises:
        ConfigError: The package ``inspect_ai`` is not installed.
        FileNotFoundError: There is no such file.
        DataError: The file is no log of Inspect, or decodes to more than the bounds allow.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    _refuse_large(file)
    try:
        from inspect_ai.log import read_eval_log_samples
    except ImportError as error:
        raise ConfigError(
            f"{file}: a log of Inspect is read with its package: {install_command('inspect_ai')}"
        ) from error
    try:
        for number, sample in enumerate(
            read_eval_log_samples(str(file), all_samples_required=False), start=1
        ):
            yield number, _sample(sample)
    except DataError:
        raise
    except Exception as error:  # the package names no class for a damaged log
        raise DataError(f"{file} is not a readable log of Inspect: {error}") from error


def _refuse_large(file: Path) -> None:
    """Raise DataError where a log decodes to too much; its package reads without bounds."""
    size = file.stat().st_size
    if file.suffix.lower() == ".eval" or zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as archive:
                parts = [part.file_size for part in archive.infolist()]
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{file} is not a readable log of Inspect: {error}") from error
        refuse_expansion(file, size, sum(parts))
        size = max(parts, default=0)
    if size > MAX_BYTES:
        raise DataError(f"{file}: one part has {size:,} bytes, the most is {MAX_BYTES:,}")


def _sample(sample: Any) -> ForeignSample | str:  # noqa: ANN401 - inspect_ai.log.EvalSample
    if sample.error is not None:
        return "the sample ended with an error"
    scores = {name: _value(score.value) for name, score in (sample.scores or {}).items()}
    flat = {
        name if inner is None else f"{name}_{inner}": number
        for name, values in scores.items()
        for inner, number in values.items()
    }
    completion = sample.output.completion
    if not completion:
        return "the model's output has no text"
    prompt = sample.input
    if not isinstance(prompt, str):
        prompt = [{"role": message.role, "content": message.text} for message in prompt]
    stop = sample.output.choices[0].stop_reason if sample.output.choices else None
    finish = {"stop": FinishReason.STOP, "max_tokens": FinishReason.LENGTH}
    return ForeignSample(
        prompt=prompt,
        completion=completion,
        scores=flat,
        reward=next(iter(flat.values()), math.nan),
        finish_reason=finish.get(stop or "", FinishReason.UNKNOWN),
        of_prompt={"id": plain_json(sample.id), "target": plain_json(sample.target)},
        of_sample={"epoch": sample.epoch, "model": plain_json(sample.output.model)},
    )


def _value(value: Any) -> dict[str | None, float]:  # noqa: ANN401 - whatever a scorer gave
    """The numbers of a score by their names; None is the name of a plain one."""
    if isinstance(value, dict):
        found = {str(name): _value(inner).get(None) for name, inner in value.items()}
        return {name: number for name, number in found.items() if number is not None}
    if isinstance(value, str):
        number = _VALUES.get(value)
        return {} if number is None else {None: number}
    return {None: float(value)} if isinstance(value, int | float) else {}
