"""Processes that are started, watched and killed by the hundred."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any


def processes() -> ForkServerContext:
    """Processes forked from a server that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.goals.dead_writers", "tests.goals.readers", "quark.selftest.writers"]
    )
    return context


def start(work: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """A process that does ``work(*arguments, sending)``, and the end that receives."""
    context = processes()
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_quietly, args=(work, arguments, sending), daemon=True)
    process.start()
    sending.close()
    return process, receiving


def _quietly(work: Callable[..., None], arguments: tuple[Any, ...], sending: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    work(*arguments, sending)
