"""The scales of an ensemble's members, frozen on the first exploration and kept in a file of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import ValidationError

from quark.errors import RunDirectoryError, UnsafeFileError
from quark.formats import VERSION_KEY, check_version, number_in, object_in
from quark.pool.base import SamplePool
from quark.pool.columns import member_column
from quark.pool.combiners import CombinerConfig, Ensemble, Standard, standard_of
from quark.publication import publish_file
from quark.safe_files import read_bytes

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Standards:
    """Mean and deviation of each member's scores of the first exploration."""

    members: Mapping[str, Standard]
    """By score column, in order."""

    @classmethod
    def measured(cls, pool: SamplePool, columns: Sequence[str]) -> Self:
        """Of the samples of round 0, or of all samples where there are none any more.

        Raises:
            KeyError: there is no such score column.
        """
        is_first = pool.column("round") == 0
        is_first[: pool.num_removed] = False
        if not is_first.any():
            is_first = np.arange(len(pool)) >= pool.num_removed
        return cls(members={name: standard_of(pool.scores(name)[is_first]) for name in columns})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Those in a file that ``write`` wrote.

        Raises:
            FileNotFoundError: there is none.
            RunDirectoryError: it is damaged, or of a newer quark.
        """
        try:
            said = object_in(json.loads(read_bytes(path, path.parent)))
            check_version(said, path, newest=FORMAT_VERSION, error=RunDirectoryError)
            members = {}
            for name, value in object_in(said["members"]).items():
                scale = object_in(value)
                mean, deviation = number_in(scale["mean"]), number_in(scale["deviation"])
                if not (np.isfinite(mean) and np.isfinite(deviation) and deviation > 0):
                    raise ValueError(f"the scale of {name!r} is not one")
                members[name] = Standard(mean=mean, deviation=deviation)
        except FileNotFoundError:
            raise
        except (OSError, UnsafeFileError, ValueError, KeyError, TypeError, RecursionError) as err:
            raise RunDirectoryError(
                f"{path} does not hold the scales of an ensemble's members: {err}"
            ) from err
        return cls(members=members)

    def write(self, path: Path) -> None:
        """Publish the file. Raises OSError."""
        said = {
            VERSION_KEY: FORMAT_VERSION,
            "members": {
                name: {"mean": standard.mean, "deviation": standard.deviation}
                for name, standard in self.members.items()
            },
        }
        publish_file(path, json.dumps(said, indent=1) + "\n")

    def ensemble(self, combiner: CombinerConfig) -> Ensemble:
        """The combination of the members by these scales."""
        return Ensemble(
            columns=tuple(self.members),
            standards=tuple(self.members.values()),
            combiner=combiner,
        )


def recorded_ensemble(config: Mapping[str, Any], path: Path) -> Ensemble | None:
    """What a run ranks by, from its parsed ``config.toml`` and its file of scales; None without an ensemble.

    A file that is missing or damaged, or does not have the members of the configuration, gives None, too.
    """
    reward, combiner = config.get("reward"), config.get("combiner", {})
    if not isinstance(reward, dict) or reward.get("name") != "ensemble":
        return None
    members = reward.get("members")
    if not isinstance(members, list):
        return None
    try:
        ensemble = Standards.read(path).ensemble(CombinerConfig.model_validate(combiner))
    except (FileNotFoundError, RunDirectoryError, ValidationError):
        return None
    expected = tuple(member_column(number + 1) for number in range(len(members)))
    return ensemble if ensemble.columns == expected else None
