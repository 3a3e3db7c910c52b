"""The reference from a cache: the original model runs once on each sample, not once in each step that draws it.

What is kept are its last hidden states at the completion's positions, in half precision; its head turns
them into exact logits in each step. Samples that were committed together are computed together, in blocks
whose bounds follow from the chunk alone, and what is used is what was stored, at the first use as well.
Exploration hands its samples in by such blocks before they are committed: the pass that gives their
log-probabilities is then the only one. So the numbers of a step depend neither on what was drawn before nor on interruptions: a block that is missing,
damaged, or of other weights is computed again and is the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quark.data.collate import collate
from quark.errors import ModelError, TrainingError
from quark.models.batch import TrainingBatch
from quark.models.causal import CausalModel, CompletionRows
from quark.models.logprobs import token_nll
from quark.models.lora import frozen_digest
from quark.models.policy import Policy
from quark.pool.base import SamplePool
from quark.reference.base import ReferencePolicy
from quark.reference.row_files import RowFiles
from quark.refusals import way_on
from quark.training.loop.draws import chunk_key, first_snapshot_with
from quark.training.processes.process_group import ProcessGroup

LENGTH_GROUPS = 4
"""A block is run in so many parts of similar length, to compute less padding."""


@dataclass(frozen=True, slots=True)
class _Block:
    """The rows of samples that are computed together."""

    rows: Tensor
    """[M, D] mapped from disk."""
    ends: NDArray[np.int64]
    """[N] where each sample's rows end."""


class CachedReference(ReferencePolicy):
    """A reference that remembers samples of the run's pool; other texts it computes as ever.

    Args:
        inner: computes what is not there.
        files: of this run.
        pool: holds the samples.
        run_id: first part of the chunks' keys.
        policy: its tokens tell prompts and completions apart.
        block_size: samples of a chunk that are computed together: those that exploration hands in together.
        autocast: the context for forward passes.
        autocast_dtype: of that context, None where there is none.
        processes: the processes; blocks are dealt out.

    Raises:
        ModelError: the model's logits are more than a projection of its last hidden states.
    """

    def __init__(
        self,
        inner: ReferencePolicy,
        *,
        files: RowFiles,
        pool: SamplePool,
        run_id: str,
        policy: Policy,
        block_size: int,
        autocast: Callable[[], AbstractContextManager[object]],
        autocast_dtype: torch.dtype | None,
        processes: ProcessGroup,
    ) -> None:
        head_dtype = inner.causal.head_dtype
        if head_dtype is None:
            raise ModelError(
                f"reference.cache: {type(inner.causal.model).__name__} does more to its logits than project its "
                'hidden states, so these are not enough to keep: leave it "off"'
            )
        self._inner = inner
        self._files = files
        self._pool = pool
        self._run_id = run_id
        self._policy = policy
        self._block_size = block_size
        self._autocast = autocast
        self._processes = processes
        self._head_dtype = head_dtype
        # What the head rounds its input to anyway, so that nothing is lost; else the finer of the halves.
        is_half = head_dtype in (torch.float16, torch.bfloat16)
        self._dtype = autocast_dtype or (head_dtype if is_half else torch.float16)
        self._origin = f"{frozen_digest(inner.causal.model)} {self._dtype} {LENGTH_GROUPS}"
        self._chunks: list[range] = []  # in order, those that were asked for
        self._blocks: dict[range, _Block] = {}

    @property
    def causal(self) -> CausalModel:
        """The original model of the inner reference."""
        return self._inner.causal

    def prepare(self, sample_ids: Sequence[int]) -> None:
        """Compute and store the missing rows of these samples; each process makes its share of the blocks."""
        for block in sorted({self._block_of(i) for i in sample_ids}, key=lambda ids: ids.start):
            if block.start // self._block_size % self._processes.size == self._processes.rank:
                self._open(block)
        # The others read what this process has made.
        self._processes.gather(None)

    def completion_rows(self, batch: TrainingBatch) -> CompletionRows:
        """The stored rows of the batch's samples; a batch without sample ids is computed by the inner reference."""
        if batch.sample_ids is None:
            return self._inner.completion_rows(batch)
        rows = torch.cat([self._rows_of(i) for i in batch.sample_ids.tolist()])
        return self._projectable(rows, batch.sample_ids.device)

    def sequence_logprobs(
        self, batch: TrainingBatch, *, base_vocab_size: int, is_block: bool = False
    ) -> Tensor:
        """float32 [B] log-probabilities in nats; the rows of a whole block are stored for later steps."""
        if not is_block:
            return self._inner.sequence_logprobs(batch, base_vocab_size=base_vocab_size)
        rows = self._projectable(self._stored(batch), batch.targets.device)
        nll = token_nll(rows, batch.targets, base_vocab_size=base_vocab_size)
        return -batch.sum_by_sequence(nll)

    def _projectable(self, rows: Tensor, device: torch.device) -> CompletionRows:
        """Stored rows as the head takes them."""
        rows = rows.to(device).to(self._head_dtype)
        return CompletionRows(rows=rows, head=self.causal.head, parameters=())

    def _rows_of(self, sample_id: int) -> Tensor:
        ids = self._block_of(sample_id)
        block = self._open(ids)
        place = sample_id - ids.start
        begin = block.ends[place - 1] if place else 0
        return block.rows[int(begin) : int(block.ends[place])]

    def _block_of(self, sample_id: int) -> range:
        """The ids of the samples that ``sample_id`` is computed with."""
        place = bisect_right(self._chunks, sample_id, key=lambda ids: ids.start) - 1
        chunk = self._chunks[place] if place >= 0 else None
        if chunk is None or sample_id not in chunk:
            pool = self._pool_with(sample_id)
            [sample] = pool.samples([sample_id])
            chunk = pool.find(chunk_key(self._run_id, sample.round, sample.chunk))
            if chunk is None or sample_id not in chunk:
                # Another run's, which an import or a merge brought: computed alone.
                chunk = range(sample_id, sample_id + 1)
            insort(self._chunks, chunk, key=lambda ids: ids.start)
        begin = sample_id - (sample_id - chunk.start) % self._block_size
        return range(begin, min(begin + self._block_size, chunk.stop))

    def _pool_with(self, sample_id: int) -> SamplePool:
        """The pool, or one of its snapshots where the sample was removed while a round learnt from it."""
        if sample_id >= self._pool.num_removed or self._pool.path is None:
            return self._pool
        return first_snapshot_with(self._pool.path, sample_id + 1)

    def _open(self, ids: range) -> _Block:
        """A block of the pool, computed and stored where it is not there yet."""
        if ids in self._blocks:
            return self._blocks[ids]
        policy = self._policy
        samples = self._pool_with(ids.start).gather(
            np.arange(ids.start, ids.stop, dtype=np.uint64), pad_id=policy.pad_id
        )
        # The reference sees no reward token, so any quantile will do.
        any_quantile = dataclasses.replace(samples, quantiles=np.zeros_like(samples.quantiles))
        batch = collate(any_quantile, policy.reward_tokens.ids, policy.pad_id, policy.device)
        ends = samples.completion_lengths.astype(np.int64).cumsum()
        return self._blocks.setdefault(ids, _Block(self._stored(batch), ends))

    def _stored(self, batch: TrainingBatch) -> Tensor:
        """The rows [M, D] of a whole block, as they are on disk; computed and stored where they are not.

        Raises:
            TrainingError: they cannot be stored, or their numbers do not fit half precision.
        """
        origin = self._origin_of(batch)
        rows = self._files.load(origin)
        if rows is not None:
            return rows
        computed = self._compute(batch)
        try:
            self._files.save(origin, computed)
        except OSError as err:
            raise TrainingError(
                f"reference.cache: cannot store {computed.nbytes / 1e6:,.1f} MB for {batch.num_sequences} samples: "
                f"{err}. Pool and checkpoints are good; {way_on(err)}"
            ) from err
        rows = self._files.load(origin)
        if rows is None:
            raise TrainingError(
                "reference.cache: what was stored comes back damaged: the disk or its file system is not to be trusted"
            )
        return rows

    def _origin_of(self, batch: TrainingBatch) -> str:
        """Hex digest of all that the rows of ``batch`` follow from."""
        digest = hashlib.sha256(self._origin.encode())
        prompts = batch.prompt_tokens.cpu().numpy()
        completions = batch.completion_tokens.cpu().numpy()
        lengths = zip(batch.prompt_lengths.tolist(), batch.completion_lengths.tolist(), strict=True)
        for prompt, completion, (before, after) in zip(prompts, completions, lengths, strict=True):
            digest.update(f"{before} {after}".encode())
            digest.update(prompt[len(prompt) - before :].tobytes())
            digest.update(completion[:after].tobytes())
        return digest.hexdigest()

    def _compute(self, batch: TrainingBatch) -> Tensor:
        """The rows [M, D] of ``batch``, sample after sample, in half precision."""
        places = torch.arange(batch.num_sequences, device=batch.prompt_lengths.device)
        found: dict[int, Tensor] = {}
        with torch.no_grad(), self._autocast():
            for part in dataclasses.replace(batch, sample_ids=places).split(LENGTH_GROUPS):
                assert part.sample_ids is not None
                rows = self._inner.completion_rows(part).rows.to(self._dtype)
                by_sample = torch.split(rows, part.completion_lengths.tolist())
                found.update(zip(part.sample_ids.tolist(), by_sample, strict=True))
        computed = torch.cat([found[place] for place in range(batch.num_sequences)])
        if not bool(torch.isfinite(computed).all()):
            raise TrainingError(
                f"reference.cache: the original model's hidden states go beyond what {self._dtype} holds: set "
                'reference.cache = "off" (in a new run), or train in bfloat16'
            )
        return computed
