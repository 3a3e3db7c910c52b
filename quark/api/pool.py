"""``quark.Pool``: a durable pool of scored samples from Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from quark.data.columns import columns_of
from quark.errors import ConfigError
from quark.pool.base import (
    Quantization,
    RemainderRule,
    Retained,
    Sample,
    SampleBatch,
    SamplingMode,
    Snapshot,
    TieRule,
)
from quark.pool.columns import REWARD_COLUMN
from quark.pool.defaults import (
    COMPACTED_FILE,
    FIT_EVERY,
    FIT_HELD_OUT,
    FIT_STEPS,
    NUM_QUANTILES,
    RESCORING_CHUNK,
)
from quark.pool.info import Collected, Compacted, PoolInfo, PoolSettings, VerifyReport
from quark.pool.native import NativePool
from quark.pool.plain import Encoder, batch_of
from quark.pool.rescore import Rescored
from quark.pool.scope import Scope, Score
from quark.run_directory import RunDirectory
from quark.types import Json

if TYPE_CHECKING:
    import polars as pl

    from quark.interchange.training_sets import SetKind, TrainingSet
    from quark.training.explain import Explanation
    from quark.training.fit import Fit, FitPoint


class Pool:
    """Scored samples in a folder. Each append survives a crash, and any score ranks the samples into quantiles.

    One process at a time can write a pool, and any number can read it. Open it with ``with``, or call ``close``.

    >>> with quark.Pool.create("samples", vocab_size=50257) as pool:  # doctest: +SKIP
    ...     pool.append(prompt_tokens=[[1, 2]], completion_tokens=[[3]], completion=["!"], reward=[0.5])
    range(0, 1)
    """

    def __init__(self, native: NativePool, *, tokenizer: Encoder | None = None) -> None:
        """Use ``create`` or ``open``."""
        self._native = native
        self._tokenizer = tokenizer

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        vocab_size: int | None = None,
        tokenizer: Any = None,  # noqa: ANN401 - a tokenizer of transformers
        store_text: bool = True,
        tie_seed: int = 0,
        metadata: Mapping[str, Json] | None = None,
    ) -> Self:
        """Create an empty pool and open it for writing.

        Args:
            path: a path that does not exist, or an empty folder. The parent must exist.
            vocab_size: token ids are below this. None takes it from ``tokenizer``.
            tokenizer: encodes texts that ``append`` gets without tokens. It is not stored.
            store_text: whether to store the texts of completions.
            tie_seed: seed of the hash that orders equal scores.
            metadata: stored with the pool.

        Raises:
            ValueError: neither ``vocab_size`` nor ``tokenizer`` is given.
            FileExistsError: ``path`` exists.
        """
        if vocab_size is None:
            if tokenizer is None:
                raise ValueError("give vocab_size, or a tokenizer")
            # Added tokens may leave gaps, so the highest id counts, not the number of tokens.
            vocab_size = max(tokenizer.get_vocab().values()) + 1
        native = NativePool.create(
            path,
            vocab_size=vocab_size,
            store_text=store_text,
            tie_seed=tie_seed,
            metadata=metadata,
        )
        return cls(native, tokenizer=tokenizer)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        writable: bool = False,
        snapshot: int | None = None,
        tokenizer: Encoder | None = None,
    ) -> Self:
        """Open a pool, or the pool of a run directory.

        Args:
            path: the pool, or the run directory.
            writable: open it to append or rescore. Fails while another process writes.
            snapshot: show this older state; None shows the newest.
            tokenizer: as in ``create``.

        Raises:
            FileNotFoundError: there is no pool.
            PoolLockedError: another process has the pool open for writing.
            PoolCorruptedError: committed samples are damaged.
        """
        run = RunDirectory(Path(path))
        place = run.own(run.pool) if run.is_run() else Path(path)
        native = NativePool.open(place, writable=writable, snapshot=snapshot)
        return cls(native, tokenizer=tokenizer)

    @staticmethod
    def verify(path: str | Path) -> VerifyReport:
        """Read every byte of a pool without changing it, and list all damage."""
        run = RunDirectory(Path(path))
        return NativePool.verify(run.pool if run.is_run() else path)

    def append(
        self,
        samples: object = None,
        *,
        tokenizer: Encoder | None = None,
        key: str | None = None,
        round: int = 0,
        chunk: int = 0,
        policy_step: int = 0,
        settings: Mapping[str, Json] | None = None,
        **columns: object,
    ) -> range:
        """Commit samples durably and return their ids.

        >>> pool.append(prompt=["Hi"], completion=[" there"], reward=[0.7], tokenizer=tokenizer)  # doctest: +SKIP
        range(0, 1)

        Args:
            samples: a frame, a ``datasets.Dataset``, a list of rows or a ``SampleBatch``; or pass the columns by
                keyword.
            tokenizer: encodes texts; None uses the one of ``create`` or ``open``.
            key: idempotency key. For a known key, this writes nothing and returns the ids of the first append. None
                makes a key from the content, so that the same samples are appended only once.
            round: the round of the samples.
            chunk: the part of the round.
            policy_step: optimizer steps that the sampling policy had taken.
            settings: sampling settings.
            **columns: N values each: ``prompt`` and ``completion`` (texts), or ``prompt_tokens`` and
                ``completion_tokens``; ``prompt_metadata``, ``finish_reason``, ``reward_token``, ``seed`` and
                ``logprob_policy``, ``logprob_reference``, ``logprob_sampled`` (nats). Any other column is a score;
                None and NaN are "not scored".

        Raises:
            DataError: a column is missing, or a value does not fit. Names row and column.
            PoolError: the pool is open for reading, or a sync failed.
        """
        if isinstance(samples, SampleBatch):
            return self._native.append(samples)
        given = {} if samples is None else columns_of(samples, text_column="completion")
        given |= columns_of(columns, text_column="completion") if columns else {}
        batch = batch_of(
            given,
            tokenizer=tokenizer or self._tokenizer,
            store_text=self._native.settings.store_text,
            key=key,
            round=round,
            chunk=chunk,
            policy_step=policy_step,
            settings=settings or {},
        )
        return self._native.append(batch)

    def quantize(
        self,
        num_quantiles: int = NUM_QUANTILES,
        *,
        score: Score = REWARD_COLUMN,
        scope: Scope | None = None,
        ties: TieRule | str = TieRule.HASH,
        remainder: RemainderRule | str = RemainderRule.SPREAD,
    ) -> Quantization:
        """Rank the samples and cut the ranking into quantiles. Quantile 0 holds the lowest scores.

        Args:
            num_quantiles: K.
            score: a score column, or a combination of several (``quark.WeightedSum`` and others).
            scope: which samples to rank, and against which.
            ties: how to order equal scores at a boundary.
            remainder: which quantiles get the remaining samples if they do not divide evenly.

        Raises:
            KeyError: there is no such score column.
            ValueError: an argument does not fit.
        """
        return self._native.quantize(
            num_quantiles,
            score=score,
            scope=scope,
            ties=TieRule(ties),
            remainder=RemainderRule(remainder),
        )

    def sample(
        self,
        batch_size: int,
        *,
        num_quantiles: int = NUM_QUANTILES,
        step: int = 0,
        seed: int = 0,
        quantiles: Sequence[int] | None = None,
        score: Score = REWARD_COLUMN,
        scope: Scope | None = None,
        mode: SamplingMode | str = SamplingMode.STRATIFIED,
    ) -> pl.DataFrame:
        """Draw a batch with equal parts of each quantile. The same arguments draw the same samples.

        In a training loop, use ``quantize(...).sampler(...)``, which prepares batches of tokens ahead.

        Args:
            batch_size: number of rows.
            num_quantiles: K.
            step: position in the endless sequence of batches.
            seed: seed of the sequence.
            quantiles: draw only from these.
            score: as in ``quantize``.
            scope: as in ``quantize``.
            mode: how to choose quantiles.

        Returns:
            One row for each draw: ``quantile``, then the columns of ``scan``.
        """
        import polars as pl

        sampler = self.quantize(num_quantiles, score=score, scope=scope).sampler(
            batch_size=batch_size, seed=seed, mode=SamplingMode(mode), quantiles=quantiles
        )
        ids, labels = sampler.draw(step)
        drawn = pl.DataFrame({"quantile": labels, "id": ids})
        rows = self.scan().filter(pl.col("id").is_in(sorted(set(ids.tolist())))).collect()
        return drawn.join(rows, on="id", how="left", maintain_order="left")

    def rescore(
        self,
        reward: object,  # a name, or anything that can be called
        name: str = REWARD_COLUMN,
        *,
        chunk_size: int = RESCORING_CHUNK,
        restart: bool = False,
        on_warning: Callable[[str], object] | None = None,
        **settings: object,
    ) -> Rescored:
        """Score every sample again and switch to the new scores in one commit. Nothing is generated.

        After an interruption, call this again to continue. Older snapshots keep their scores.

        Args:
            reward: a name (``"toxicity"``, ``"./file.py:function"``), or anything that is called as
                ``reward(prompts=[...], completions=[...])``.
            name: the score column.
            chunk_size: samples per commit.
            restart: discard the draft of an interrupted call.
            on_warning: called with a message about samples without a score; None ignores them.
            **settings: settings of the section ``reward``, for example ``length={"maximum": 3}``.

        Raises:
            RewardError: the reward fails.
            ValueError: the name of the column is not valid, or the pool is empty or stores no text.
        """
        from quark.api.rescoring import rescore
        from quark.api.rewards import named_or_given

        function, config = named_or_given(reward, settings)
        return rescore(
            self._native,
            name,
            function,
            config,
            chunk_size=chunk_size,
            restart=restart,
            on_warning=on_warning or _ignore,
        )

    def explain(self, sample: int, *, num_quantiles: int | None = None) -> Explanation:
        """Why a sample was chosen: its origin, its rank by every score, and the steps that trained on it.

        Args:
            sample: its id.
            num_quantiles: K of its standings; None is the run's, or the default for a pool without a run.

        Raises:
            IndexError: the pool has no such sample, or ``retain`` removed it.
            RunDirectoryError: the run's configuration cannot be read.
        """
        from quark.training.explain import explain

        return explain(self.path, sample, num_quantiles=num_quantiles)

    def training_set(
        self,
        folder: str | Path,
        kind: SetKind | Literal["sft", "dpo", "kto", "reward"],
        *,
        force: bool = False,
        **rules: Any,  # noqa: ANN401 - a rule's own type
    ) -> TrainingSet:
        """Write a training set in TRL's layout, with a card; ``datasets.load_dataset(folder)`` reads it.

        Args:
            folder: is made; its parent exists.
            kind: the layout.
            force: replace the folder.
            **rules: fields of ``quark.interchange.training_sets.SetRules``: ``score``, ``top``, ``bottom``,
                ``min_margin``, ``max_per_prompt``, ``where``, ``test_share`` and ``seed``.

        Raises:
            ConfigError: a rule does not fit, the folder exists, or the rules leave nothing.
        """
        from quark.interchange.training_sets import SetKind, SetRules, export_training_set

        known = [field.name for field in dataclasses.fields(SetRules)]
        if unknown := sorted(rules.keys() - set(known)):
            raise ConfigError(f"there is no rule {unknown[0]!r}; there are: {', '.join(known)}")
        return export_training_set(
            self._native, Path(folder), SetKind(kind), SetRules(**rules), is_overwriting=force
        )

    def fit(
        self,
        *,
        model: str | None = None,
        score: str = REWARD_COLUMN,
        steps: int = FIT_STEPS,
        every: int = FIT_EVERY,
        held_out: float = FIT_HELD_OUT,
        out: str | Path | None = None,
        on_point: Callable[[FitPoint], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
        allow: Sequence[str] = (),
        **settings: object,
    ) -> Fit:
        """Test whether a model can learn a score from these samples; generates and scores nothing.

        Args:
            model: the model that wrote the samples, as in ``model.name``; None is the run's.
            score: the column to learn.
            steps: of the optimizer.
            every: steps between two measurements.
            held_out: share of the prompts that no step learns from.
            out: a new folder for the model at its best step; None saves none.
            on_point: is told each measurement.
            on_warning: is told warnings; None ignores them.
            allow: what the run's own configuration may reach.
            **settings: as in ``quark.train``.

        Returns:
            The measurements; ``verdict`` says in a sentence whether the score can be learned.

        Raises:
            ConfigError: no model is named, or a setting does not fit.
            DataError: the tokens are another model's, or there is too little to learn from or to measure.
        """
        from quark.api.arguments import settings_table
        from quark.api.fitting import fitting
        from quark.api.process import prepare_process
        from quark.training.fit import fit

        prepare_process()
        configured = fitting(
            self.path,
            model=model,
            settings=settings_table(settings),
            steps=steps,
            held_out=held_out,
            allow=allow,
            model_option="model=",
        )
        return fit(
            self._native,
            configured.config,
            score=score,
            every=every,
            out=None if out is None else Path(out),
            is_rate_chosen=configured.is_rate_chosen,
            on_begin=_ignore,
            on_point=on_point or _ignore,
            on_message=on_warning or _ignore,
        )

    def scan(self) -> pl.LazyFrame:
        """The samples as a lazy polars frame, one row each, in id order.

        Columns: ``id``, ``prompt_id``, ``prompt_text``, ``prompt_tokens``, ``prompt_metadata``, ``completion_tokens``,
        ``completion_text``, ``finish_reason``, ``round``, ``chunk``, ``policy_step``, ``reward_token``, ``settings``,
        ``seed``, ``logprob_...`` (nats), ``key``, and each score under its name.
        """
        return self._native.scan()

    def query(self, sql: str) -> pl.DataFrame:
        """The answer to a ``SELECT`` over the table ``pool``, which has the columns of ``scan``.

        Raises:
            ConfigError: the query reads anything else, or polars cannot compute it.
        """
        from quark.api.querying import answered

        with answered(self._native, sql) as rows:
            return rows.collect()

    def samples(self, ids: Sequence[int]) -> list[Sample]:
        """The samples with these ids, in the order given. Raises IndexError for an unknown or removed id."""
        return self._native.samples(ids)

    def scores(self, name: str = REWARD_COLUMN) -> NDArray[np.float32]:
        """[N] a score column in id order, NaN where a sample has no score. Raises KeyError."""
        return self._native.scores(name)

    @property
    def score_columns(self) -> tuple[str, ...]:
        """Names of the score columns."""
        return self._native.score_columns

    @property
    def path(self) -> Path:
        """The pool's folder, absolute."""
        return self._native.path

    @property
    def settings(self) -> PoolSettings:
        """The settings that the pool was created with."""
        return self._native.settings

    @property
    def snapshot(self) -> Snapshot:
        """The commit that this object shows."""
        return self._native.snapshot

    @property
    def native(self) -> NativePool:
        """The underlying pool, which quark's own functions take."""
        return self._native

    def info(self) -> PoolInfo:
        """Counts and statistics, from one pass over the scores."""
        return self._native.info()

    def refresh(self) -> Snapshot:
        """Move to the newest commit on disk and return it."""
        return self._native.refresh()

    def fork(self, path: str | Path) -> Self:
        """Create a second pool with the same samples, open for writing. Both share files through hard links."""
        return type(self)(self._native.fork(path), tokenizer=self._tokenizer)

    def compact(self, *, max_samples: int = COMPACTED_FILE) -> Compacted:
        """Merge small files into large ones. Ids, samples and scores do not change."""
        return self._native.compact(max_samples=max_samples)

    def retain(
        self,
        *,
        max_samples: int | None = None,
        max_rounds: int | None = None,
        before_round: int | None = None,
        dry_run: bool = False,
    ) -> Retained:
        """Remove the oldest appends that exceed a limit, in one commit. With ``dry_run``, only count them."""
        return self._native.retain(
            max_samples=max_samples,
            max_rounds=max_rounds,
            before_round=before_round,
            dry_run=dry_run,
        )

    def gc(self, *, keep_snapshots: int, dry_run: bool = False) -> Collected:
        """Expire all but the newest snapshots, and remove the files that only the others need."""
        return self._native.gc(keep_snapshots=keep_snapshots, dry_run=dry_run)

    def close(self) -> None:
        """Release the writer's lock. The pool can still be read."""
        self._native.close()

    def __len__(self) -> int:
        return len(self._native) - self._native.num_removed

    def __repr__(self) -> str:
        return f"quark.Pool({str(self.path)!r}, {len(self):,} samples)"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _ignore(_said: object) -> None:
    pass
