"""Processes that work for another one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch.distributed as dist

from shared_networks.errors import InputError


def process_pool(count: int, start: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """Return processes that leave Ctrl-C to this one, and that end when it does, even if it is killed.

    Args:
        count: of processes.
        start: called in each of them before any work.
        arguments: of `start`.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads can hang
    return ProcessPoolExecutor(count, spawn, _start, (start, arguments))


def check_processes(together: bool, overlay: str) -> None:
    """Refuse processes of torchrun that would each do all of the work, or train networks of their own.

    Args:
        together: whether they work together.
        overlay: config that makes them do so.

    Raises:
        InputError: there are several and they do not.
    """
    grouped = dist.is_available() and dist.is_initialized()
    count = dist.get_world_size() if grouped else int(os.environ.get("WORLD_SIZE", 1))
    if count > 1 and not together:
        raise InputError(
            f"WORLD_SIZE is {count}: torchrun started {count} processes, which would each do all of the work or train "
            f"a network of its own; add 'configs/{overlay}' to --config_file, or start one process"
        )


def _start(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes

    def follow_parent() -> None:
        # A killed parent cannot tell its workers, and they would wait for work for ever.
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    if start:
        start(*arguments)
