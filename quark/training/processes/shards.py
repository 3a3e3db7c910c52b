"""The shard of a weight that this process holds, and the full weight that it is a part of.

A sharded weight is a ``DTensor``, split along its first dimension into pieces of equal length. The last ones may be
shorter or empty. A process holds all of any other tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_shard(tensor: Tensor) -> Tensor:
    """The rows that this process holds, as a view. It may be empty if there are fewer rows than processes."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All rows. For a sharded tensor this is a copy, and a collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_local_row(tensor: Tensor) -> int:
    """Number of the first row that this process holds."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh = tensor.device_mesh
    return min(mesh.get_local_rank() * -(-len(tensor) // mesh.size()), len(tensor))


def local_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """The part of the rows ``start`` to ``stop`` that this process holds, as a view."""
    first = first_local_row(tensor)
    return local_shard(tensor)[max(start - first, 0) : max(stop - first, 0)]


@torch.no_grad()
def copy_full(tensor: Tensor, rows: Tensor) -> None:
    """Copy this process's part of the full tensor ``rows`` into its shard of ``tensor``."""
    if isinstance(tensor, DTensor):
        first = first_local_row(tensor)
        rows = rows[first : first + len(tensor.to_local())]
    local_shard(tensor).copy_(rows)
