"""``run.json``: which run a directory holds, where its settings come from, and what scored its samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from quark.errors import RunDirectoryError
from quark.formats import (
    VERSION_KEY,
    by_name,
    check_version,
    object_in,
    optional,
    text_in,
    whole_in,
)
from quark.publication import publish_file
from quark.run_directory import RunDirectory
from quark.safe_files import read_bytes
from quark.types import Json

FORMAT_VERSION = 1

Files = Mapping[str, str]
"""SHA-256 of each file that scores, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstRound:
    """The pool whose samples a run began with."""

    pool: str
    """Its uuid."""
    generation: int
    """The snapshot that was copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """What ``run.json`` says."""

    run_id: str
    quark_version: str | None = None
    """Of the quark that made the run; None where the file does not say."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """By key of the configuration, where its value comes from."""
    scored_by: Mapping[str, Files] | None = None
    """By score column, what its scores were made with; None before a reward was loaded."""
    reward_sha256: str | None = None
    """Hash of the reward's only file, in runs made before imported modules were recorded; ``scored_by`` is None then."""
    first_round: FirstRound | None = None
    """None for a run that explored its first round."""

    @classmethod
    def read(cls, run: RunDirectory) -> Self:
        """The identity of a run.

        Raises:
            RunDirectoryError: the file is missing, damaged or of a newer quark; names it.
            UnsafeFileError: it is a link out of the run, or not a plain file.
        """
        try:
            said = object_in(json.loads(read_bytes(run.identity, run.path)))
            check_version(said, run.identity, newest=FORMAT_VERSION, error=RunDirectoryError)
            return cls.of_json(said)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as err:
            reason = f"{err} is missing" if isinstance(err, KeyError) else str(err)
            raise RunDirectoryError(
                f"{run.identity} is damaged: {reason}. Bring the file back, or choose another --run-dir"
            ) from err

    def write(self, run: RunDirectory) -> None:
        """Replace the run's file by this one, all or nothing.

        Raises:
            OSError: the disk refused.
        """
        publish_file(run.identity, json.dumps(self.to_json(), indent=1) + "\n")

    def to_json(self) -> dict[str, Json]:
        """The file's content."""
        said: dict[str, Json] = {VERSION_KEY: FORMAT_VERSION, "run_id": self.run_id}
        if self.quark_version is not None:
            said["quark_version"] = self.quark_version
        if self.origins:
            said["origins"] = dict(self.origins)
        if self.scored_by is not None:
            said["scored_by"] = {column: dict(files) for column, files in self.scored_by.items()}
        if self.reward_sha256 is not None:
            said["reward_sha256"] = self.reward_sha256
        if self.first_round is not None:
            said["first_round"] = {
                "pool": self.first_round.pool,
                "generation": self.first_round.generation,
            }
        return said

    @classmethod
    def of_json(cls, said: Mapping[str, Json]) -> Self:
        """What ``to_json`` gave.

        Raises:
            KeyError, ValueError: it is something else.
        """
        return cls(
            run_id=text_in(said["run_id"]),
            quark_version=optional(text_in, said.get("quark_version")),
            origins=by_name(text_in, said.get("origins", {})),
            scored_by=optional(
                lambda columns: by_name(lambda files: by_name(text_in, files), columns),
                said.get("scored_by"),
            ),
            reward_sha256=optional(text_in, said.get("reward_sha256")),
            first_round=optional(_first_round_in, said.get("first_round")),
        )


def _first_round_in(value: Json) -> FirstRound:
    said = object_in(value)
    return FirstRound(pool=text_in(said["pool"]), generation=whole_in(said["generation"]))
