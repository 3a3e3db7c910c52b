"""One file per peer; each imports its library, so that what is missing can be skipped by name."""

from __future__ import annotations

import importlib
from typing import Any

from pool.peer import Peer

MODULES = {
    "quark": ("pool.quark_peer", "Quark"),
    "lists": ("pool.peers.lists", "Lists"),
    "numpy": ("pool.peers.numpy_ragged", "NumpyRagged"),
    "numpy-madvise": ("pool.peers.numpy_ragged", "NumpyMadvise"),
    "padded": ("pool.peers.numpy_padded", "NumpyPadded"),
    "polars": ("pool.peers.polars_ipc", "PolarsIpc"),
    "duckdb": ("pool.peers.duckdb_table", "DuckdbTable"),
    "sqlite": ("pool.peers.sqlite_table", "SqliteTable"),
    "lmdb": ("pool.peers.lmdb_environment", "LmdbEnvironment"),
    "lance": ("pool.peers.lance_dataset", "LanceDataset"),
    "datasets": ("pool.peers.hf_datasets", "HfDatasets"),
    "torchrl": ("pool.peers.torchrl_memmap", "TorchrlMemmap"),
}


NOT_FORK_SAFE = {"lance"}
"""Peers that start threads when they are imported."""


def load(name: str) -> type[Peer[Any]]:
    """The class of a peer.

    Raises:
        ImportError: its library is missing or does not load here.
    """
    module, attribute = MODULES[name]
    peer: type[Peer[Any]] = getattr(importlib.import_module(module), attribute)
    return peer
