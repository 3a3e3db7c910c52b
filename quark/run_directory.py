"""Every file name inside a run directory, in one place.

run/
  run.json          who made this run: format version, run id, quark version
  config.toml       the effective configuration
  held_out.jsonl    the prompts that are held out, with their tokens
  given/            prompts and a model that were passed to `quark.train` as objects
  pool/             the sample pool
  standards.json    the scales of an ensemble's members, where the reward is an ensemble
  metrics.jsonl     one JSON object a line (docs/metrics.md)
  checkpoints/      step-00000042/ ...
  reference_cache/  what `reference.cache` keeps of the original model; may be deleted
  served/           weights for a server that samples (sampling.backend = "http")
  model/            the newest finished model, loadable with plain transformers
  frontier.json     reward against drift, where `quark frontier` measured it
  report.html       the report
  report.md         its figures, to be pasted elsewhere
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quark import safe_files


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The paths of one run."""

    path: Path

    @property
    def identity(self) -> Path:
        """Who made the run: format version, run id and quark version."""
        return self.path / "run.json"

    @property
    def config(self) -> Path:
        """The effective configuration."""
        return self.path / "config.toml"

    @property
    def held_out(self) -> Path:
        """The held-out prompts, with their tokens."""
        return self.path / "held_out.jsonl"

    @property
    def given(self) -> Path:
        """The folder of prompts and a model that were given in Python, named by their content."""
        return self.path / "given"

    @property
    def pool(self) -> Path:
        """The folder of the sample pool."""
        return self.path / "pool"

    @property
    def standards(self) -> Path:
        """The scales of an ensemble's members."""
        return self.path / "standards.json"

    @property
    def metrics(self) -> Path:
        """The log, one JSON object a line; see ``docs/metrics.md``."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder with one folder for each checkpoint."""
        return self.path / "checkpoints"

    @property
    def reference_cache(self) -> Path:
        """The folder with what ``reference.cache`` keeps of the original model; may be deleted."""
        return self.path / "reference_cache"

    @property
    def model(self) -> Path:
        """The folder of the newest finished model, which plain transformers loads."""
        return self.path / "model"

    @property
    def served(self) -> Path:
        """The folder of weights for a server that samples."""
        return self.path / "served"

    @property
    def frontier(self) -> Path:
        """The measurements of ``quark frontier``."""
        return self.path / "frontier.json"

    @property
    def report(self) -> Path:
        """The report, one HTML page."""
        return self.path / "report.html"

    @property
    def report_markdown(self) -> Path:
        """The report's figures as Markdown."""
        return self.path / "report.md"

    @classmethod
    def around(cls, path: Path) -> RunDirectory:
        """The run that ``path`` is, or is the pool of, by whatever name; it need not be one."""
        run = cls(path)
        if run.is_run():
            return run
        # The link may be what leads to the pool, or lie in the run and lead out of it.
        for parent in (path.resolve().parent, path.absolute().parent):
            outer = cls(parent)
            if outer.is_run() and outer.pool.resolve() == path.resolve():
                return outer
        return run

    def own(self, path: Path) -> Path:
        """``path`` of this run as it is.

        Raises:
            UnsafeFileError: a link leads from it out of the run directory.
        """
        return safe_files.contained(path, self.path)

    def check(self) -> None:
        """Check every file and folder here, but for the inside of the pool, which checks itself, and of W&B's folder.

        Raises:
            UnsafeFileError: a link leads out of the run directory, or something is neither a file nor a folder.
        """
        for path in self.path.iterdir():
            if path.name in (self.pool.name, "wandb"):
                self.own(path)
            else:
                safe_files.check_tree(path, self.path)

    def is_run(self) -> bool:
        """Whether this directory holds a run of ours."""
        return self.identity.is_file()
