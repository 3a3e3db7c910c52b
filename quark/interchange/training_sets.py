"""Samples of a pool as training sets in TRL's data-set layouts, chosen by rules and described by a card.

A set is a folder of Parquet files with a README that ``datasets.load_dataset`` reads. Ids, scores and hashes of all
samples are held in memory, 32 bytes each, and the texts of the chosen ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from quark import __version__
from quark.errors import ConfigError
from quark.pool.columns import REWARD_COLUMN
from quark.pool.export import narrowed
from quark.pool.scan import SCORE_PREFIX
from quark.printable import printable
from quark.publication import publishing_directory

if TYPE_CHECKING:
    from quark.pool.native import NativePool

_TRAIN_FILE = "train.parquet"
_MARKUP = re.compile(r"[\\`*_\[\]|]")


class SetKind(StrEnum):
    """What a training set is for."""

    SFT = "sft"
    """``prompt``, ``completion``: the best samples."""
    DPO = "dpo"
    """``prompt``, ``chosen``, ``rejected``, ``score_chosen``, ``score_rejected``: pairs within a prompt."""
    KTO = "kto"
    """``prompt``, ``completion``, ``label``: the best and the worst samples."""
    REWARD = "reward"
    """``prompt``, ``chosen``, ``rejected``, ``margin``: the same pairs for a reward model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRules:
    """Which samples go into a training set.

    Raises:
        ConfigError: A value is out of its range.
    """

    score: str = REWARD_COLUMN
    """Score column; higher is better."""
    top: float = 0.2
    """Share of the samples that are positive, above 0 and at most 1. Samples with the lowest of their scores count, too."""
    bottom: float | None = None
    """Share of the samples that are negative (KTO); None takes all that are not positive."""
    min_margin: float = 0.0
    """Least difference of the scores in a pair; a pair of equal scores is never taken."""
    max_per_prompt: int | None = None
    """Samples (for KTO positive and negative ones each) or pairs of one prompt; None takes all."""
    where: str | None = None
    """SQL condition on the columns of a scan."""
    test_share: float = 0.0
    """Share of the prompts whose rows go into the split ``test``."""
    seed: int = 0
    """Chooses the prompts of ``test``."""

    def __post_init__(self) -> None:
        ranges: list[tuple[str, float, bool, str]] = [
            ("top", self.top, 0 < self.top <= 1, "above 0 and at most 1"),
            ("bottom", self.bottom or 1, 0 < (self.bottom or 1) <= 1, "above 0 and at most 1"),
            ("min-margin", self.min_margin, 0 <= self.min_margin < math.inf, "at least 0"),
            ("test-share", self.test_share, 0 <= self.test_share < 1, "at least 0 and below 1"),
            (
                "max-per-prompt",
                self.max_per_prompt or 1,
                self.max_per_prompt is None or self.max_per_prompt >= 1,
                "at least 1",
            ),
        ]
        for name, value, fits, what in ranges:
            if not fits:
                raise ConfigError(f"--{name} is {value}; it must be {what}")
        if self.bottom == 0:
            raise ConfigError("--bottom is 0; it must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """What was written."""

    folder: Path
    kind: SetKind
    num_train: int
    """Rows."""
    num_test: int
    num_prompts: int
    num_samples: int
    """Of the pool, after ``where``."""
    num_unscored: int
    """Of these, without a finite score."""
    num_repeated: int
    """Of these, with the prompt and the completion of another one."""
    lowest_positive: float
    """Lowest score of a positive or chosen sample."""
    highest_negative: float
    """Highest score of a negative or rejected sample; NaN for ``sft``."""


def export_training_set(
    pool: NativePool,
    folder: Path,
    kind: SetKind,
    rules: SetRules,
    *,
    is_overwriting: bool = False,
) -> TrainingSet:
    """Write samples of ``pool.snapshot`` to a new folder as a training set.

    The folder holds ``train.parquet``, ``test.parquet`` where some prompts are held out, and ``README.md``, the card.
    It appears when it is whole.

    Args:
        pool: To read; it stores text.
        folder: Its parent exists.
        kind: The layout.
        rules: The choice.
        is_overwriting: Whether a folder that is there is replaced.

    Raises:
        ConfigError: The folder exists, the pool has no text or no such score, ``where`` is no condition, or the rules
            leave nothing.
        FileNotFoundError: The parent of the folder does not exist.
        PoolCorruptedError: Samples are damaged; no folder appears.
        OSError: The disk refused; no folder appears.
    """
    if not pool.settings.store_text:
        raise ConfigError(f"{pool.path} stores no text, and a training set consists of texts")
    if rules.score not in pool.score_columns:
        there = ", ".join(pool.score_columns) or "none"
        raise ConfigError(f"{pool.path} has no score column {rules.score!r} (it has: {there})")
    if folder.exists() and not is_overwriting:
        raise ConfigError(f"{folder} exists; --force replaces it")
    if folder.exists() and not _is_replaceable(folder):
        raise ConfigError(
            f"{folder} is no training set, and --force replaces nothing else: choose another name"
        )
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no directory {folder.parent}")
    candidates = _candidates(pool, rules)
    rows = _CHOICES[kind](candidates.frame, rules)
    if rows.is_empty():
        raise ConfigError(
            f"no {'pair' if 'rejected' in rows.columns else 'sample'} of {pool.path} fits the rules: "
            f"{candidates.num_samples:,} samples, {candidates.num_unscored:,} without a score, "
            f"{candidates.num_repeated:,} repeated"
        )
    rows = rows.sort(rows.columns[0])
    written = _with_texts(pool, rows, kind)
    is_test = _is_test(written["prompt"], rules)
    train, test = written.filter(~is_test), written.filter(is_test)
    if train.is_empty():
        raise ConfigError(f"--test-share {rules.test_share} leaves no prompt to train on")
    result = TrainingSet(
        folder=folder,
        kind=kind,
        num_train=train.height,
        num_test=test.height,
        num_prompts=written["prompt"].n_unique(),
        num_samples=candidates.num_samples,
        num_unscored=candidates.num_unscored,
        num_repeated=candidates.num_repeated,
        lowest_positive=_extreme(rows, is_positive=True),
        highest_negative=_extreme(rows, is_positive=False),
    )
    with publishing_directory(folder, is_replacing=is_overwriting) as staged:
        train.write_parquet(staged / _TRAIN_FILE)
        if test.height:
            test.write_parquet(staged / "test.parquet")
        (staged / "README.md").write_text(card(pool, rules, result), encoding="utf-8")
    return result


def _is_replaceable(folder: Path) -> bool:
    """Whether it holds a training set, or nothing."""
    return folder.is_dir() and ((folder / _TRAIN_FILE).is_file() or not any(folder.iterdir()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """The samples to choose from."""

    frame: pl.DataFrame
    """``id``, ``prompt`` (a hash of its text), ``score``."""
    num_samples: int
    num_unscored: int
    num_repeated: int


def _candidates(pool: NativePool, rules: SetRules) -> _Candidates:
    rows = pool.scan()
    columns = rows.collect_schema().names()
    shown = rules.score if rules.score in columns else SCORE_PREFIX + rules.score
    if f"{SCORE_PREFIX}{rules.score}" in columns:
        shown = SCORE_PREFIX + rules.score
    if rules.where is not None:
        rows, _ = narrowed(rows, rules.where)
    found = rows.select(
        "id",
        pl.col("prompt_text").hash().alias("prompt"),
        pl.col("completion_text").hash().alias("completion"),
        pl.col(shown).alias("score"),
    ).collect()
    scored = found.filter(pl.col("score").is_finite())
    unique = scored.sort("id").unique(["prompt", "completion"], keep="first", maintain_order=True)
    return _Candidates(
        frame=unique.drop("completion"),
        num_samples=found.height,
        num_unscored=found.height - scored.height,
        num_repeated=scored.height - unique.height,
    )


def _best(rows: pl.DataFrame, rules: SetRules) -> pl.DataFrame:
    """The samples whose score is at least that of the last one in the top share."""
    if rows.is_empty():
        return rows
    scores = rows["score"].sort(descending=True)
    cut = scores[math.ceil(rules.top * rows.height) - 1]
    return rows.filter(pl.col("score") >= cut)


def _at_most(rows: pl.DataFrame, rules: SetRules, *, best_first: bool) -> pl.DataFrame:
    """At most ``rules.max_per_prompt`` rows of each prompt, those with the most extreme scores."""
    if rules.max_per_prompt is None:
        return rows
    ordered = rows.sort(["score", "id"], descending=[best_first, False])
    return ordered.group_by("prompt", maintain_order=True).head(rules.max_per_prompt)


def _sft(rows: pl.DataFrame, rules: SetRules) -> pl.DataFrame:
    return _at_most(_best(rows, rules), rules, best_first=True).select(
        "id", pl.lit(True).alias("label"), "score"
    )


def _kto(rows: pl.DataFrame, rules: SetRules) -> pl.DataFrame:
    good = _best(rows, rules)
    bad = rows.join(good.select("id"), on="id", how="anti")
    if rules.bottom is not None and bad.height:
        scores = rows["score"].sort()
        cut = scores[math.ceil(rules.bottom * rows.height) - 1]
        bad = bad.filter(pl.col("score") <= cut)
    if good.is_empty() or bad.is_empty():
        return rows.clear().select("id", pl.lit(True).alias("label"), "score")
    parts = [
        _at_most(part, rules, best_first=label).select("id", pl.lit(label).alias("label"), "score")
        for part, label in ((good, True), (bad, False))
    ]
    return pl.concat(parts)


def _pairs(rows: pl.DataFrame, rules: SetRules) -> pl.DataFrame:
    """The best of each prompt with its worst, the second best with the second worst, and so on."""
    ordered = rows.sort(["prompt", "score", "id"], descending=[False, True, False]).with_columns(
        pl.int_range(pl.len()).over("prompt").alias("rank"), pl.len().over("prompt").alias("size")
    )
    chosen = ordered.filter(pl.col("rank") < pl.col("size") // 2)
    rejected = ordered.select(
        "prompt",
        (pl.col("size") - 1 - pl.col("rank")).alias("rank"),
        pl.col("id").alias("rejected"),
        pl.col("score").alias("score_rejected"),
    )
    pairs = chosen.join(rejected, on=["prompt", "rank"], how="inner").filter(
        pl.col("score") > pl.col("score_rejected"),
        pl.col("score") - pl.col("score_rejected") >= rules.min_margin,
    )
    if rules.max_per_prompt is not None:
        pairs = pairs.filter(pl.col("rank") < rules.max_per_prompt)
    return pairs.select(
        pl.col("id").alias("chosen"),
        "rejected",
        pl.col("score").alias("score_chosen"),
        "score_rejected",
    )


_CHOICES: Mapping[SetKind, Callable[[pl.DataFrame, SetRules], pl.DataFrame]] = {
    SetKind.SFT: _sft,
    SetKind.KTO: _kto,
    SetKind.DPO: _pairs,
    SetKind.REWARD: _pairs,
}


def _with_texts(pool: NativePool, rows: pl.DataFrame, kind: SetKind) -> pl.DataFrame:
    """The rows in the layout of their kind."""
    is_paired = "rejected" in rows.columns
    ids = pl.concat([rows["chosen"], rows["rejected"]]) if is_paired else rows["id"]
    wanted = ids.alias("id").to_frame().lazy()
    texts = (
        pool.scan()
        .select(
            "id", pl.col("prompt_text").alias("prompt"), pl.col("completion_text").alias("text")
        )
        .join(wanted, on="id", how="semi")
        .collect()
    )
    if not is_paired:
        joined = rows.join(texts, on="id", how="left", maintain_order="left")
        labels = [pl.col("label")] if kind is SetKind.KTO else []
        return joined.select("prompt", pl.col("text").alias("completion"), *labels)
    joined = rows.join(
        texts.select(pl.col("id").alias("chosen"), "prompt", pl.col("text").alias("chosen_text")),
        on="chosen",
        how="left",
        maintain_order="left",
    ).join(
        texts.select(pl.col("id").alias("rejected"), pl.col("text").alias("rejected_text")),
        on="rejected",
        how="left",
        maintain_order="left",
    )
    margin = (pl.col("score_chosen") - pl.col("score_rejected")).alias("margin")
    numbers = (
        [margin] if kind is SetKind.REWARD else [pl.col("score_chosen"), pl.col("score_rejected")]
    )
    return joined.select(
        "prompt",
        pl.col("chosen_text").alias("chosen"),
        pl.col("rejected_text").alias("rejected"),
        *numbers,
    )


def _is_test(prompts: pl.Series, rules: SetRules) -> pl.Series:
    """By a hash of the prompt, so that a prompt stays on its side when the pool grows."""

    def hashed(prompt: str) -> bool:
        digest = hashlib.sha256(f"{rules.seed}\n{prompt}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < rules.test_share * 2**64

    sides = {prompt: hashed(prompt) for prompt in prompts.unique()}
    return pl.Series([sides[prompt] for prompt in prompts], dtype=pl.Boolean)


def _extreme(rows: pl.DataFrame, *, is_positive: bool) -> float:
    if "rejected" in rows.columns:
        scores = rows["score_chosen" if is_positive else "score_rejected"]
    else:
        scores = rows.filter(pl.col("label") == is_positive)["score"]
    if scores.is_empty():
        return math.nan
    extreme = scores.min() if is_positive else scores.max()
    return float(extreme)  # type: ignore[arg-type]


def card(pool: NativePool, rules: SetRules, made: TrainingSet) -> str:
    """The README of a training set: its files for ``datasets``, and how it was made."""
    splits = ["train", "test"] if made.num_test else ["train"]
    files = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in splits)
    model = pool.settings.metadata.get("model", pool.settings.metadata.get("tokenizer"))
    facts: list[tuple[str, object]] = [
        ("layout", f"{made.kind} (TRL)"),
        ("rows", f"{made.num_train:,} train, {made.num_test:,} test"),
        ("prompts", f"{made.num_prompts:,}"),
        ("score", rules.score),
        ("condition", rules.where or "none"),
    ]
    if made.kind in (SetKind.SFT, SetKind.KTO):
        facts.append(
            (
                "positive",
                f"the top {rules.top:.3g} of the samples: {made.lowest_positive:.6g} or more",
            )
        )
    if made.kind is SetKind.KTO:
        share = "all others" if rules.bottom is None else f"the bottom {rules.bottom:.3g}"
        facts.append(("negative", f"{share}: {made.highest_negative:.6g} or less"))
    if made.kind in (SetKind.DPO, SetKind.REWARD):
        facts += [
            ("pairs", "within a prompt: best with worst, second best with second worst, ..."),
            ("least margin", f"{rules.min_margin:.6g}, and never 0"),
        ]
    facts += [
        ("at most per prompt", rules.max_per_prompt or "no limit"),
        ("split", f"by prompt, share {rules.test_share:.3g} in test, seed {rules.seed}"),
        ("samples of the pool", f"{made.num_samples:,}"),
        ("left out", f"{made.num_unscored:,} without a score, {made.num_repeated:,} repeated"),
        ("model of the samples", model or "unknown"),
        ("pool", f"{pool.settings.uuid}, snapshot {pool.snapshot.generation}"),
        ("made by", f"quark {__version__}"),
    ]
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}tags:\n- trl\n- {made.kind}\n---\n\n"
        f"# A {made.kind} set from scored samples\n\n"
        "`datasets.load_dataset` reads this folder. The rows were chosen from a pool of scored samples by these rules:\n\n"
        "| | |\n| --- | --- |\n" + "".join(_table(facts))
    )


def _table(facts: Iterable[tuple[str, object]]) -> Iterable[str]:
    for name, value in facts:
        text = value if isinstance(value, str) else json.dumps(value)
        shown = _MARKUP.sub(r"\\\g<0>", printable(text, limit=300)).replace("<", "&lt;")
        yield f"| {name} | {shown} |\n"
