"""How the trained weights are laid out over the processes: replicated, or sharded (FSDP2).

With sharded weights, a process keeps its rows of every weight, gradient and moment. ``fully_shard`` gathers a layer
while a training pass runs it, so these passes are collective, and every process makes the same number of them.
For work of a single process (sampling, log-probabilities for the pool, saving) there is a twin: a copy of the model
without weights, temporarily filled with the gathered weights.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from quark.errors import TrainingError
from quark.models.batch import TrainingBatch
from quark.models.causal import Body, CausalModel, CompletionRows
from quark.models.policy import Policy
from quark.models.precision import is_projection
from quark.reference.adapter_off import AdapterOffReference
from quark.reference.base import ReferencePolicy
from quark.training.processes.memory import memory_needed_for, run_within_memory
from quark.training.processes.process_group import ProcessGroup, checksum
from quark.training.processes.shards import full_tensor, local_rows, local_shard

_Result = TypeVar("_Result")
_Holder = TypeVar("_Holder")


class Weights(ABC):
    """The trained weights, replicated or sharded over the processes.

    Notes about collective calls apply to the sharded subclass only.

    Args:
        policy: the policy to train.
        processes: the process group.
    """

    is_sharded: ClassVar[bool]

    def __init__(self, policy: Policy, processes: ProcessGroup) -> None:
        self._policy = policy
        self._processes = processes

    @property
    @abstractmethod
    def local_policy(self) -> Policy:
        """The policy that a single process runs or saves within ``gathered``. It is not for training."""

    @abstractmethod
    def gathered(self) -> AbstractContextManager[None]:
        """Within the context, ``local_policy`` has its weights. Entering and leaving are collective calls."""

    @abstractmethod
    def gathered_for_sampling(self) -> AbstractContextManager[None]:
        """Like ``gathered``, only for passes under the run's autocast. Weights may be rounded like autocast does."""

    @abstractmethod
    def distribute(self, reference: ReferencePolicy) -> ReferencePolicy:
        """``reference``, with the same layout of weights as the policy."""

    @abstractmethod
    def num_passes(self, needed: int) -> int:
        """Number of training passes that this process makes if it needs ``needed``."""

    @abstractmethod
    def run(
        self,
        attempt: Callable[[int], _Result],
        size: int,
        *,
        on_smaller: Callable[[int, str], None],
    ) -> tuple[_Result, int]:
        """The passes of a training step; see ``run_within_memory``.

        Raises:
            TrainingError: there is not enough memory.
        """

    @abstractmethod
    def sum_gradients(self) -> None:
        """Replace every gradient by its sum over the processes."""

    @abstractmethod
    def clip_gradients(self, bound: float) -> float:
        """Scale the gradients down to a norm of at most ``bound``. Returns the previous norm, equal in all processes."""

    @property
    @abstractmethod
    def reward_vectors(self) -> Tensor:
        """The reward tokens' input vectors [K, D] that this process updates, as a view without gradient."""

    @abstractmethod
    def release(self) -> None:
        """Free the weights that a training or evaluation pass has gathered."""

    @abstractmethod
    def require_equal(self, *, step: int) -> None:
        """Check that all processes train the same weights.

        Raises:
            TrainingError: they do not.
        """

    @abstractmethod
    def full_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors, contiguous and on the CPU, in the main process; none in the others. A collective call."""

    def _parameters(self) -> Iterator[nn.Parameter]:
        yield from self._policy.model.parameters()


class ReplicatedWeights(Weights):
    """Replicated weights: every process holds all of them. For data parallelism and for a single process."""

    is_sharded = False

    @property
    def local_policy(self) -> Policy:
        """The policy itself, which has all weights."""
        return self._policy

    def gathered(self) -> AbstractContextManager[None]:
        """A context that does nothing, because the weights are complete."""
        return nullcontext()

    def gathered_for_sampling(self) -> AbstractContextManager[None]:
        """A context that does nothing, because the weights are complete and are not rounded."""
        return nullcontext()

    def distribute(self, reference: ReferencePolicy) -> ReferencePolicy:
        """Return ``reference`` unchanged: every process holds all of it."""
        return reference

    def num_passes(self, needed: int) -> int:
        """Return ``needed``: a pass needs no other process."""
        return needed

    def run(
        self,
        attempt: Callable[[int], _Result],
        size: int,
        *,
        on_smaller: Callable[[int, str], None],
    ) -> tuple[_Result, int]:
        """The passes of a training step, repeated in smaller micro-batches if memory runs out."""

        def agree(reason: str | None) -> str | None:
            return next((r for r in self._processes.gather(reason) if r is not None), None)

        return run_within_memory(attempt, size, on_smaller=on_smaller, agree=agree)

    def sum_gradients(self) -> None:
        """Replace the gradients by their sums. Raises TrainingError if there is not enough memory."""
        # The sum copies gradients after the memory of the passes is free. It is not repeated.
        with memory_needed_for("summing the gradients", setting="model"):
            self._processes.sum_gradients([p for p in self._parameters() if p.requires_grad])

    def clip_gradients(self, bound: float) -> float:
        """Scale the gradients down to a norm of at most ``bound``, and return the previous norm."""
        parameters = [p for p in self._parameters() if p.grad is not None]
        return float(torch.nn.utils.clip_grad_norm_(parameters, bound))

    @property
    def reward_vectors(self) -> Tensor:
        """[K, D] the input vectors of all reward tokens, as a view without gradient."""
        return self._policy.reward_vectors

    def release(self) -> None:
        """Nothing was gathered."""

    def require_equal(self, *, step: int) -> None:
        """Raise TrainingError if the parameters differ between processes."""
        self._processes.require_equal(self._parameters(), step=step)

    def full_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, contiguous and on the CPU, in the main process; empty in the others."""
        if not self._processes.is_main_process:
            return {}
        return {name: _saved(value) for name, value in tensors.items()}


class ShardedWeights(Weights):
    """Every process holds a shard of each weight of policy and reference (FSDP2).

    Args:
        policy: the policy, equal in all processes. It is sharded in place.
        processes: the process group, of more than one process.
        autocast_dtype: the type of the run's autocast; None without autocast.
    """

    is_sharded = True

    def __init__(
        self, policy: Policy, processes: ProcessGroup, *, autocast_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(policy, processes)
        self._autocast_dtype = autocast_dtype
        self._mesh = processes.mesh(policy.device)
        self._twin = _Twin(policy, policy.model, shared=(policy.tokenizer, policy.critics))
        self._has_gathered: set[FSDPModule] = set()
        self._shard(policy.causal.body)

    @property
    def local_policy(self) -> Policy:
        """The twin of the policy, which has weights only within ``gathered``."""
        return self._twin.holder

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within the context, the policy's twin holds the full weights. All processes enter and leave it together."""
        with self._filled(self._twin, None):
            yield

    @contextmanager
    def gathered_for_sampling(self) -> Iterator[None]:
        """Like ``gathered``, with weights in the type that the run's autocast would round them to."""
        with self._filled(self._twin, self._autocast_dtype):
            yield

    def distribute(self, reference: ReferencePolicy) -> ReferencePolicy:
        """Shard the reference. A reference without weights of its own shares the policy's shards."""
        if isinstance(reference, AdapterOffReference):
            # The policy's own weights, which are already sharded.
            return ShardedReference(
                reference, AdapterOffReference(self.local_policy), self.gathered_for_sampling
            )
        twin = _Twin(reference, reference.causal.model, shared=())
        self._shard(reference.causal.body)
        return ShardedReference(
            reference, twin.holder, lambda: self._filled(twin, self._autocast_dtype)
        )

    def num_passes(self, needed: int) -> int:
        """The largest ``needed`` of all processes, because every pass is collective."""
        most: int = max(self._processes.gather(needed))
        return most

    def run(
        self,
        attempt: Callable[[int], _Result],
        size: int,
        *,
        on_smaller: Callable[[int, str], None],  # noqa: ARG002 - see below
    ) -> tuple[_Result, int]:
        """The passes of a training step.

        Raises:
            TrainingError: memory ran out. A retry is impossible, because the other processes wait within a layer.
        """
        needed = memory_needed_for("the layers of a step", setting="optimizer.micro_batch_size")
        with needed, self._processes.exchange():
            return attempt(size), size

    def sum_gradients(self) -> None:
        """Does nothing: backward passes have already summed the gradients."""

    def clip_gradients(self, bound: float) -> float:
        """Scale the local shards so that the norm over all shards is at most ``bound``. Returns the previous norm."""
        gradients = [local_shard(p.grad) for p in self._parameters() if p.grad is not None]
        square = float(torch.nn.utils.get_total_norm(gradients)) ** 2
        norm = math.sqrt(self._processes.sums({"square": square})["square"])
        if math.isfinite(norm) and norm > bound:
            for gradient in gradients:
                gradient.mul_(bound / (norm + 1e-6))
        return norm

    @property
    def reward_vectors(self) -> Tensor:
        """[k, D] the k reward tokens' input vectors in this process's shard, as a view without gradient."""
        policy = self._policy
        if policy.adapter is not None and policy.adapter.embedding is not None:
            return local_shard(policy.adapter.embedding.rows.detach())
        ids = policy.reward_tokens.ids
        weight: Tensor = policy.model.get_input_embeddings().weight
        return local_rows(weight.detach(), ids[0], ids[-1] + 1)

    def release(self) -> None:
        """Free layers that a pass without a backward pass left gathered."""
        # After a pass without a backward pass: the embedding, the head, and a list of the layers that ran.
        for body in self._has_gathered:
            body.reset_iter_state()
        self._has_gathered.clear()

    def require_equal(self, *, step: int) -> None:
        """Check that every process gathers the weights that the shards hold.

        Only one process holds each number, so there is no copy to compare with. But the checksum of a full weight is
        the sum of the checksums of its shards.

        Raises:
            TrainingError: a process gathers other weights.
        """
        parts, gathered = [], []
        with self._processes.exchange():
            for parameter in self._parameters():
                parts.append(checksum(local_shard(parameter.detach())))
                gathered.append(checksum(full_tensor(parameter.detach())))
        sums = [sum(column) % 2**64 for column in zip(*self._processes.gather(parts), strict=True)]
        for rank, checksums in enumerate(self._processes.gather(gathered)):
            if [one % 2**64 for one in checksums] != sums:
                raise TrainingError(
                    f"after step {step} process {rank} does not gather the weights that the processes hold: "
                    "the network or memory is damaged. The last checkpoint is good"
                )

    def full_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather one tensor after another. The main process keeps them on the CPU; the result is empty in the others."""
        gathered = {}
        with self._processes.exchange():
            for name, value in tensors.items():
                # One at a time, so that the other processes never hold more than one.
                everything = full_tensor(value)
                if self._processes.is_main_process:
                    gathered[name] = _saved(everything)
        return gathered

    def _shard(self, body: Body) -> None:
        sharded = shard(body, self._mesh)
        body.register_forward_hook(lambda *_: self._has_gathered.add(sharded))

    @contextmanager
    def _filled(self, twin: _Twin[_Holder], dtype: torch.dtype | None) -> Iterator[None]:
        try:
            with (
                memory_needed_for("the whole weights", setting="model"),
                self._processes.exchange(),
            ):
                twin.fill(dtype)
            yield
        finally:
            twin.empty()


class ShardedReference(ReferencePolicy):
    """A reference whose passes are collective, or local within ``gathered``.

    Args:
        together: the sharded reference.
        local: its twin.
        gathered: the context in which the twin has its weights.
    """

    def __init__(
        self,
        together: ReferencePolicy,
        local: ReferencePolicy,
        gathered: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._together = together
        self._local = local
        self._gathered = gathered
        self._is_gathered = False

    @property
    def causal(self) -> CausalModel:
        """The model of the twin, to sample from within ``gathered``."""
        return self._local.causal

    def completion_rows(self, batch: TrainingBatch) -> CompletionRows:
        """Run the twin within ``gathered``; otherwise the sharded model, in a collective call."""
        return (self._local if self._is_gathered else self._together).completion_rows(batch)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within the context, the twin has its weights and passes need no other process."""
        with self._gathered():
            self._is_gathered = True
            try:
                yield
            finally:
                self._is_gathered = False


class _Twin(Generic[_Holder]):
    """A copy of a model and its owner, without weights until it is filled.

    Args:
        original: the owner of the model, before the model is sharded.
        model: the model whose weights fill the twin.
        shared: parts of the original that need not be copied.
    """

    def __init__(
        self, original: _Holder, model: PreTrainedModel, *, shared: Iterable[object]
    ) -> None:
        memo: dict[int, object] = {id(one): one for one in (*shared, *model.buffers())}
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        twin: PreTrainedModel
        self.holder, twin = copy.deepcopy((original, model), memo)
        self._model = model
        self._slots: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
        for name, empty in twin.named_parameters(remove_duplicate=False):
            path, _, leaf = name.rpartition(".")
            self._slots[name] = (twin.get_submodule(path), leaf, empty)
        for layer in _layers(twin):
            # Recomputation is bound to the layers of the original, and is useless without a backward pass.
            layer.__dict__.pop("forward", None)

    @torch.no_grad()
    def fill(self, dtype: torch.dtype | None) -> None:
        """Fill the twin with the full weights, tied ones once.

        Args:
            dtype: the type of the autocast for all passes; None without. Linear layers get their weights in this type,
                one at a time, which does not change results and halves the memory.
        """
        gathered: dict[tuple[int, torch.dtype], nn.Parameter] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            module, leaf, _ = self._slots[name]
            is_weight = leaf == "weight" and is_projection(module)
            kind = dtype if dtype is not None and is_weight else parameter.dtype
            key = (id(parameter), kind)
            if key not in gathered:
                gathered[key] = nn.Parameter(full_tensor(parameter).to(kind), requires_grad=False)
            setattr(module, leaf, gathered[key])

    def empty(self) -> None:
        """Free the weights."""
        for module, leaf, empty in self._slots.values():
            setattr(module, leaf, empty)


def shard(body: Body, mesh: DeviceMesh) -> FSDPModule:
    """Shard ``body`` in place. Decoder layers are gathered one by one, the rest (embedding, head) at once.

    Gradients are summed, not averaged, because losses are divided by the sequences or tokens of the whole batch.
    """
    modules = [*_layers(body), body]
    for module in modules:
        # The head is needed right after the body.
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=module is not body)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    # A weight without a gradient here (an expert that no token chose) may have one elsewhere.
    sharded.set_reduce_scatter_unused_params(True)
    return sharded


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, inner ones first, as the library marks them."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)][::-1]


def _saved(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
