"""Damage to a pool's files: every flipped byte, cut and lost file is refused by name, or harmless.

Harmless means that what is read is equal to what was written. Reading other data is what must not be,
and so is an error that leaves the reader without the file to look at.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quark.errors import PoolError
from quark.pool.base import SamplePool
from quark.pool.columns import REWARD_COLUMN
from quark.pool.native import NativePool
from quark.selftest.base import Check, OnTrial
from quark.selftest.samples import VOCAB_SIZE, fields, make_batch

_NUM_COMMITS = 8
"""As many as it takes for runs to be merged, so that there is a file of every kind."""
_KEYS = [f"damaged/{number}" for number in range(_NUM_COMMITS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing done to one file."""

    file: str
    """Relative to the pool."""
    what: str
    content: bytes | None
    """The file afterwards; None where it is gone."""


def check_damage(
    folder: Path, *, num_bytes: int | None, chance: random.Random, on_trial: OnTrial
) -> Check:
    """Damage a small pool in many ways, one at a time.

    Args:
        folder: for the pool.
        num_bytes: how many bytes to flip, at random places; None flips each one.
        chance: chooses the places.
        on_trial: told after every damage.
    """
    path = folder / "damaged"
    expected = _make_pool(path)
    files = {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    places = [(file, at) for file, content in files.items() for at in range(len(content))]
    flipped = places if num_bytes is None else chance.sample(places, min(num_bytes, len(places)))
    damages = [*_flips(files, flipped, chance), *_cuts(files)]
    problems: list[str] = []
    num_refused = 0
    for done, damage in enumerate(damages, start=1):
        with _damaged(path, damage):
            refused, problem = _judge(path, damage, expected)
        num_refused += refused
        if problem:
            problems.append(f"{damage.file}, {damage.what}: {problem}")
        on_trial(done, len(damages))
    return Check(
        name="damage",
        num_trials=len(damages),
        detail=f"{len(flipped):,} of {len(places):,} bytes flipped and {len(damages) - len(flipped)} "
        f"files cut or removed, one at a time: {num_refused:,} refused by name, "
        f"{len(damages) - num_refused:,} harmless",
        problems=tuple(problems),
    )


def _make_pool(path: Path) -> dict[str, object]:
    with NativePool.create(path, vocab_size=VOCAB_SIZE) as pool:
        for number, key in enumerate(_KEYS):
            pool.append(
                make_batch(key, {REWARD_COLUMN: [0.5, float("nan"), -number]}, content=number)
            )
        return _content(pool)


def _content(pool: SamplePool) -> dict[str, object]:
    """Everything that can be read, by every way to read it."""
    quantization = pool.quantize(3)
    return {
        "snapshot": pool.snapshot,
        "samples": [fields(sample) for sample in pool.samples(range(len(pool)))],
        "scores": {name: pool.scores(name).tobytes() for name in pool.score_columns},
        "keys": [pool.find(key) for key in _KEYS],
        "labels": quantization.labels().tolist(),
        "draw": quantization.sampler(batch_size=16, seed=0).draw(5)[0].tolist(),
    }


def _flips(
    files: dict[str, bytes], places: list[tuple[str, int]], chance: random.Random
) -> Iterator[Damage]:
    for file, at in places:
        content = bytearray(files[file])
        content[at] ^= chance.randrange(1, 256)
        yield Damage(file=file, what=f"byte {at} flipped", content=bytes(content))


def _cuts(files: dict[str, bytes]) -> Iterator[Damage]:
    for file, content in files.items():
        for length in (0, len(content) // 2, len(content) - 1):
            yield Damage(file=file, what=f"cut to {length} bytes", content=content[:length])
        yield Damage(file=file, what="removed", content=None)


@contextmanager
def _damaged(path: Path, damage: Damage) -> Iterator[None]:
    """The pool with one file replaced or gone, and afterwards as it was.

    The file is replaced and never written to: whoever had it mapped keeps the old one.
    """
    file = path / damage.file
    aside = path.with_name("aside")
    file.rename(aside)
    try:
        if damage.content is not None:
            file.write_bytes(damage.content)
        yield
    finally:
        aside.replace(file)


def _judge(path: Path, damage: Damage, expected: dict[str, object]) -> tuple[bool, str | None]:
    """Whether reading was refused, and what is wrong with what happened."""
    is_lost = damage.content is None
    # LOCK holds a message for people, and HEAD only bounds what a log may lose.
    if not _is_found(path) and damage.file != "LOCK" and (damage.file, is_lost) != ("HEAD", True):
        return False, "not found by verify"
    try:
        with NativePool.open(path) as pool:
            content = _content(pool)
    except PoolError as error:
        folder = str(Path(damage.file).parent)
        # A lost log is told by the directory that lacks it.
        if damage.file in str(error) or (is_lost and folder in str(error)):
            return True, None
        return True, f"refused without naming the file: {error}"
    except Exception as error:
        return True, f"not refused in order, but by {type(error).__name__}: {error}"
    wrong = [name for name in expected if content[name] != expected[name]]
    if wrong:
        return False, f"not noticed, and other data was read: {', '.join(wrong)}"
    return False, None


def _is_found(path: Path) -> bool:
    return not NativePool.verify(path).is_sound
