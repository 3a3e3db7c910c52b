"""The processes of one run: which of them this is, and how they exchange values.

A run in one process is a group of one and starts nothing of ``torch.distributed``. Control goes over gloo
on the CPU whatever the device is: a process that dies closes its connections, so that the others learn it
at their next exchange instead of waiting. Gradients and sharded weights go over NCCL where the model is on
CUDA devices.
Values travel as JSON, which gives every float back exactly; nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from quark.errors import ConfigError, TrainingError
from quark.training.processes.launch import number_of

BUCKET_ELEMENTS = 1 << 24
"""Gradients are summed in buckets of at most this many numbers, or of one parameter."""


@dataclass(slots=True, kw_only=True)
class ProcessGroup:
    """The process group of a run, seen from this process.

    Every method that communicates is a collective call: all processes call it, in the same order. It raises
    TrainingError if a process has died or does not answer within the timeout.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank of this process on its machine, which selects its device."""
    is_sharded: bool = False
    """Whether each process holds a shard of every weight instead of all weights."""
    timeout_s: float = 1800.0
    """Maximum time that one process may keep the others waiting."""
    _gradients: distributed.ProcessGroup | None = None
    """The group that sums gradients; None for gloo, like everything else."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that scores, writes and prints."""
        return self.rank == 0

    def own_device(self, device: torch.device) -> torch.device:
        """This process's own device.

        Args:
            device: as configured, the same for all processes.

        Raises:
            ConfigError: the processes cannot each have one.
        """
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise ConfigError(
                f"run.device = {device} is one device for {self.size} processes: with several, say "
                '"cuda" (each takes its own) or "cpu"'
            )
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {self.rank} would be number {self.local_rank} of its machine, which has "
                f"{torch.cuda.device_count()} CUDA devices: start one process per device"
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        self._gradients = self._group("nccl")
        return device

    def mesh(self, device: torch.device) -> DeviceMesh:
        """The same group for sharded weights on ``device``, with its own connections."""
        group = self._gradients or self._group("gloo")
        return DeviceMesh.from_group(group, device.type)

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401 - any JSON value
        """The values of all processes, by rank. A value is any JSON value."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self.exchange():
            distributed.all_gather(lengths, torch.tensor([len(mine)]))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = mine
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        with self.exchange():
            distributed.all_gather(texts, padded)
        return [
            json.loads(text[: int(length)].numpy().tobytes())
            for text, length in zip(texts, lengths, strict=True)
        ]

    def from_main_process(self, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - any JSON value
        """Run ``work`` in the main process only, and return its result in every process.

        Raises:
            TrainingError: in the other processes, if ``work`` raised. The main process raises the exception itself.
        """
        if self.size == 1:
            return work()
        answer: dict[str, Any] = {}
        if self.is_main_process:
            try:
                answer["value"] = work()
            except Exception as error:
                # Sent first, because the others would otherwise only see a broken connection.
                self.gather({"error": f"{type(error).__name__}: {error}"})
                raise
        answer = self.gather(answer)[0]
        if "error" in answer:
            raise TrainingError(f"process 0 failed: {answer['error']}")
        return answer["value"]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return any(self.gather(flag))

    def sums(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The sum of each figure over the processes, added by rank, so that all get the same bits."""
        parts = self.gather(dict(figures))
        return {name: sum(part[name] for part in parts) for name in figures}

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes, with the same bits everywhere."""
        if self.size == 1:
            return
        # A parameter without a gradient here (an expert that no token chose) may have one elsewhere.
        lacking = self.gather([i for i, p in enumerate(parameters) if p.grad is None])
        nowhere = set(lacking[0]).intersection(*lacking[1:])
        gradients: list[Tensor] = []
        for i, parameter in enumerate(parameters):
            if i not in nowhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            with self.exchange():
                distributed.all_reduce(flat, group=self._gradients)
            start = 0
            for gradient in bucket:
                gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
                start += gradient.numel()

    def require_equal(self, parameters: Iterable[nn.Parameter], *, step: int) -> None:
        """Check that the weights have the same bits in all processes.

        Raises:
            TrainingError: they differ.
        """
        if self.size == 1:
            return
        checksums = self.gather([checksum(parameter.detach()) for parameter in parameters])
        different = [rank for rank, other in enumerate(checksums) if other != checksums[0]]
        if different:
            raise TrainingError(
                f"after step {step} the weights of process {different[0]} are not those of process 0: "
                "the machines compute differently, or memory is damaged. The last checkpoint is good"
            )

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Within the context, a broken connection raises an error that explains it.

        Raises:
            TrainingError: the connection broke.
        """
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
                raise
            raise TrainingError(
                f"process {self.rank} of {self.size} lost the others: one of them has ended, and what it "
                f"said tells why, or it gave no sign for too long ({str(error).splitlines()[0]}). Pool "
                "and checkpoints are good; the same command resumes"
            ) from error

    def leave(self, *, in_order: bool) -> None:
        """End the connections and the threads that serve them.

        Otherwise these threads notice the end of the other processes while the library is shutting down. Now and then
        one then aborts the process, which would look like a crash.

        Args:
            in_order: whether no process waits for another. If not, NCCL's connections stay open until the process
                ends, because closing them would wait for GPU work with a dead process.
        """
        if in_order or self._gradients is None:
            distributed.destroy_process_group()

    def _group(self, backend: str) -> distributed.ProcessGroup:
        with _standard_output_kept():
            group = distributed.new_group(
                backend=backend, timeout=timedelta(seconds=self.timeout_s)
            )
        assert isinstance(group, distributed.ProcessGroup), "a group of all has every process"
        return group


@contextmanager
def join_process_group(
    *, timeout_s: float, parallel: Literal["data", "sharded"] | None = None
) -> Iterator[ProcessGroup]:
    """The process group that ``torchrun`` or ``accelerate launch`` describes in the environment.

    At the end all processes wait for each other. A launcher kills the others as soon as one exits with a status other
    than 0, and the main process may still be writing.

    Args:
        timeout_s: maximum time that one process may keep the others waiting.
        parallel: replicated or sharded weights; None follows the environment.

    Raises:
        ConfigError: the environment asks for something that does not exist.
        TrainingError: the processes cannot connect.
    """
    size = number_of("WORLD_SIZE", 1)
    if size == 1:
        yield ProcessGroup()
        return
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if _says_yes(f"ACCELERATE_USE_{name}"):
            raise ConfigError(
                f"accelerate is set up for {name}, which quark does not support. Launch with --multi_gpu, with "
                "--use_fsdp --fsdp_version 2, or with torchrun"
            )
    is_sharded = _is_sharded(parallel)
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size} but {', '.join(missing)} is not set: start with torchrun or "
            "accelerate launch, or unset WORLD_SIZE"
        )
    processes = ProcessGroup(
        rank=number_of("RANK", 0),
        size=size,
        local_rank=number_of("LOCAL_RANK", 0),
        is_sharded=is_sharded,
        timeout_s=timeout_s,
    )
    try:
        with _standard_output_kept():
            distributed.init_process_group(
                "gloo", rank=processes.rank, world_size=size, timeout=timedelta(seconds=timeout_s)
            )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"process {processes.rank} of {size} did not find the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {error}"
        ) from error
    try:
        yield processes
        processes.gather(None)
    except BaseException:
        processes.leave(in_order=False)
        raise
    processes.leave(in_order=True)


@contextmanager
def _standard_output_kept() -> Iterator[None]:
    """Reserve the standard output for results. Before about torch 2.11, Gloo prints a line about its peers."""
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed: nothing to do
        yield
        return
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.close(nothing)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _is_sharded(parallel: Literal["data", "sharded"] | None) -> bool:
    """The layout that ``run.parallel`` and accelerate's configuration ask for."""
    if not _says_yes("ACCELERATE_USE_FSDP"):
        if parallel == "sharded":
            _check_torch()
        return parallel == "sharded"
    if number_of("FSDP_VERSION", 1) != 2:
        raise ConfigError(
            "accelerate is set up for FSDP version 1, and quark shards weights by version 2 alone: set fsdp_version "
            "to 2 in its configuration (--fsdp_version 2), or launch with --multi_gpu"
        )
    if parallel == "data":
        raise ConfigError(
            'accelerate is set up for FSDP (--use_fsdp), and run.parallel = "data": leave one of them out'
        )
    _check_torch()
    # With this variable, transformers would load the weights only in the first process.
    del os.environ["ACCELERATE_USE_FSDP"]
    return True


def _check_torch() -> None:
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            f"sharding the weights needs torch 2.13 or newer, and this is {torch.__version__}: install a newer one, "
            'or say run.parallel = "data"'
        )


def _says_yes(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group consecutive tensors of one type into buckets that are small enough to copy."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        is_full = size + tensor.numel() > BUCKET_ELEMENTS
        if bucket and (is_full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def checksum(tensor: Tensor) -> int:
    """A checksum of weights: the sum of a tensor's bits as integers, computed on its device.

    Modulo 2**64, the checksums of the pieces of a tensor add up to its checksum.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.contiguous().view(integers[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))
