"""Checkpoints: directories of safetensors and JSON that are complete or absent.

    checkpoints/step-00000042/
      model.safetensors      every parameter and buffer once; only trained ones for a model with frozen weights
      optimizer.safetensors  Adam's moments
      hooks.safetensors      tensors of weight hooks, such as an average of the weights; absent without any
      state.json             counters, coefficients, pool snapshot, length of the metric log
      manifest.json          name, length and SHA-256 of the other files

A directory is written under another name, synced, and renamed, as in the pool. It counts only if it verifies. A run
resumes from the newest one that does. Nothing is unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quark.errors import CheckpointError, UnsafeFileError
from quark.publication import publishing_directory, set_aside
from quark.refusals import says_nothing_of_the_bytes, way_on
from quark.safe_files import contained, read_bytes
from quark.training.processes.shards import copy_full
from quark.training.state.run_state import FILE_NAME as STATE_FILE
from quark.training.state.run_state import NewerStateError, RunState, score_of

_NAME = re.compile(r"step-(\d{8})")
_STAGED = re.compile(r"step-\d{8}\.partial-[0-9a-f]{8}")
_HOOKS_FILE = "hooks.safetensors"
_FILES = ("model.safetensors", "optimizer.safetensors", STATE_FILE)
"""The files of every checkpoint."""


BEST, LAST = "best", "last"
"""Names of checkpoints, besides steps."""


def _name_of(step: int) -> str:
    return f"step-{step:08d}"


def _step_in(path: Path) -> str:
    return path.name.removeprefix("step-").lstrip("0") or "0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    state: RunState
    has_hook_tensors: bool = False
    """Whether there are tensors of weight hooks."""

    @property
    def step(self) -> int:
        """Number of optimizer steps taken, skipped ones included."""
        return self.state.step

    def load_model(self, model: nn.Module) -> None:
        """Copy the weights into ``model``.

        Raises:
            CheckpointError: they belong to another model.
        """
        load_model_tensors(model, load_file(self.path / "model.safetensors"), self.path)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Read the optimizer's tensors, by name."""
        return load_file(self.path / "optimizer.safetensors")

    def hook_tensors(self) -> dict[str, Tensor]:
        """Read the tensors of weight hooks, by name; empty without any."""
        return load_file(self.path / _HOOKS_FILE) if self.has_hook_tensors else {}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes: parameters and persistent buffers themselves, tied ones once.

    Frozen weights (below adapters) and buffers are loaded from the model's own files again, so only the trained
    parameters are included then.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    has_frozen = any(not p.requires_grad for p in model.parameters())
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen or (has_frozen and name not in trained):
            continue
        seen.add(id(value))
        tensors[name] = value.detach()
    return tensors


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy full tensors, named as in ``model_tensors``, into ``model``, in place."""
    target = model_tensors(model)
    if target.keys() != tensors.keys() or any(
        target[name].shape != value.shape for name, value in tensors.items()
    ):
        raise CheckpointError(
            f"{path} holds the weights of another model: bring that model back, or choose another --run-dir"
        )
    for name, value in tensors.items():
        copy_full(target[name], value)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: created if missing.
        keep_last: number of newest checkpoints to keep, at least two.
        keep_best: number of checkpoints with the highest scores to keep in addition.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_best: int = 0) -> None:
        self._folder = folder
        self._keep_last = max(keep_last, 2)
        self._keep_best = keep_best
        self._rejected: set[Path] = set()

    def save(
        self,
        state: RunState,
        *,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        hooks: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Publish a checkpoint. When this returns, it survives a power cut. A step that is already saved is left alone.

        Args:
            state: everything except the tensors. Its step names the checkpoint. Its score decides whether it is among
                the best; None and NaN never are.
            weights: full weights and buffers of the model, contiguous and on the CPU.
            optimizer: moments of the optimizer, in the same form.
            hooks: tensors of weight hooks, in the same form.

        Raises:
            CheckpointError: the disk is full or failed (the message says how much space is needed), or a newer quark
                wrote the checkpoint of that step. Earlier checkpoints are unchanged.
            OSError: a checkpoint of that step exists and cannot be read now.
        """
        final = self._folder / _name_of(state.step)
        if final.is_dir():
            try:
                return verify(final).path
            except NewerStateError:
                raise
            except CheckpointError:
                # A damaged checkpoint that the run did not resume from is replaced.
                set_aside(final)
                self._rejected.discard(final)
        tensors = (*weights.values(), *optimizer.values(), *(hooks or {}).values())
        needed = sum(t.numel() * t.element_size() for t in tensors)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Checked first: a completely full disk would also stop the pool and the log.
            if needed > (free := shutil.disk_usage(self._folder).free):
                raise OSError(errno.ENOSPC, f"the disk has {_megabytes(free)} left")
            with publishing_directory(final) as staged:
                save_file(dict(weights), staged / "model.safetensors")
                save_file(dict(optimizer), staged / "optimizer.safetensors")
                if hooks:
                    save_file(dict(hooks), staged / _HOOKS_FILE)
                (staged / STATE_FILE).write_text(state.to_text(), encoding="utf-8")
                _write_manifest(staged)
        except (OSError, ValueError, RuntimeError, SafetensorError) as err:
            raise CheckpointError(
                f"cannot save the checkpoint {final}, which needs {_megabytes(needed)}: {err}. The pool and "
                f"the earlier checkpoints are good; {way_on(err)} to resume"
            ) from err
        self.prune()
        return final

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and the reasons why newer ones were rejected.

        Raises:
            CheckpointError: a newer quark wrote one of them.
            OSError: a checkpoint cannot be read now.
        """
        rejected: list[str] = []
        for path in reversed(self._published()):
            try:
                return verify(path), rejected
            except NewerStateError:
                raise  # resuming from an older one would repeat a part of the run
            except CheckpointError as err:
                rejected.append(str(err))
                self._rejected.add(path)
        return None, rejected

    def named(self, which: str) -> Checkpoint:
        """The checkpoint that ``which`` names: ``last``, ``best`` (by held-out reward), or the number of a step.

        Raises:
            CheckpointError: it does not exist, does not verify, or none was evaluated. Names the existing ones.
        """
        paths = self._published()
        if which == LAST:
            found, rejected = self.newest()
            if found is None:
                reasons = f": {'; '.join(rejected)}" if rejected else ""
                raise CheckpointError(f"{self._folder} has no checkpoint{reasons}")
            return found
        if which == BEST:
            scored = [(score, path) for path in paths if (score := score_of(path)) is not None]
            chosen = max(scored, default=(None, None))[1]
        else:
            chosen = next(
                (path for path in paths if _step_in(path) == (which.lstrip("0") or "0")), None
            )
        if chosen is None:
            steps = ", ".join(map(_step_in, paths)) or "none"
            what = "no evaluated checkpoint" if which == BEST else f"no checkpoint {which}"
            raise CheckpointError(f"{self._folder} has {what}; there are the steps {steps}")
        return verify(chosen)

    def remove_all(self) -> None:
        """Delete every checkpoint, complete or staged, and nothing else."""
        if not self._folder.is_dir():
            return
        for path in self._folder.iterdir():
            ours = _NAME.fullmatch(path.name) or _STAGED.fullmatch(path.name)
            if ours and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        if not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _published(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(p for p in self._folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())

    def prune(self) -> None:
        """Remove checkpoints that are neither among the last nor the best, and unfinished ones of a killed process."""
        if not self._folder.is_dir():
            return
        # A damaged checkpoint does not count as kept.
        sound = [path for path in self._published() if path not in self._rejected]
        kept = {*sound[-self._keep_last :], *self._best(sound)}
        for path in sound:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)
        for path in self._folder.iterdir():
            if _STAGED.fullmatch(path.name) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def _best(self, paths: list[Path]) -> list[Path]:
        """The checkpoints with the highest scores; of equal ones, the later."""
        scored = [(score, path) for path in paths if (score := score_of(path)) is not None]
        return [path for _, path in sorted(scored)[::-1][: self._keep_best]]


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def verify(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, after a check of every byte.

    Raises:
        CheckpointError: it is damaged.
        OSError: it cannot be read now, for example without permission or with too many open files.
    """
    try:
        contained(path, path.parent)
        listed = _read_manifest(path)
        for expected in listed:
            file = path / expected.name
            if file.is_symlink() or not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if file.stat().st_size != expected.num_bytes:
                raise CheckpointError(
                    f"{file} has {file.stat().st_size} bytes instead of {expected.num_bytes}"
                )
            if _sha256(file) != expected.sha256:
                raise CheckpointError(
                    f"{file} is damaged: its SHA-256 is not the one it was saved with"
                )
        state = RunState.of_text(read_bytes(path / STATE_FILE, path), path / STATE_FILE)
        if path.name != _name_of(state.step):
            raise CheckpointError(f"its {STATE_FILE} is of step {state.step}")
        has_hooks = any(file.name == _HOOKS_FILE for file in listed)
        return Checkpoint(path=path, state=state, has_hook_tensors=has_hooks)
    except NewerStateError:
        raise
    except CheckpointError as err:
        raise CheckpointError(f"{path} is not a whole checkpoint: {err}") from err
    except (
        OSError,
        UnsafeFileError,
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        RecursionError,
    ) as err:
        if isinstance(err, OSError) and says_nothing_of_the_bytes(err):
            raise
        raise CheckpointError(f"{path} is not a whole checkpoint: {err}") from err


@dataclass(frozen=True, slots=True, kw_only=True)
class _ListedFile:
    """The manifest's entry for one file. ``state.json`` has the version of its layout."""

    name: str
    num_bytes: int
    sha256: str


def _write_manifest(folder: Path) -> None:
    manifest = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in (*_FILES, _HOOKS_FILE)
        if name in _FILES or (folder / name).exists()
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _read_manifest(folder: Path) -> list[_ListedFile]:
    """The files that make up a checkpoint. Raises ValueError, KeyError, TypeError or OSError."""
    said = json.loads(read_bytes(folder / "manifest.json", folder))
    return [
        _ListedFile(name=name, num_bytes=said[name]["bytes"], sha256=said[name]["sha256"])
        for name in (*_FILES, _HOOKS_FILE)
        if name in _FILES or name in said
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
