"""Read scalars of a GPU without making it wait.

`loss.item()` halts the host until the GPU has done all that was asked of it; the GPU then idles until the host has
asked for the next iteration. A copy that the host reads when it has arrived costs neither of them anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ignite.engine import Engine, EventEnum, Events
from torch import Tensor

_LONGEST = 4  # on their way before the oldest is waited for: losses and gradients of two iterations


class ReadingEvents(EventEnum):
    """Fired by who is about to save: all scalars that are on their way are to be read first."""

    READ_ALL = "read_all"


class HostCopy:
    """Copy a scalar to the host: at once from the CPU, later from a GPU.

    Args:
        value: scalar tensor.
    """

    def __init__(self, value: Tensor) -> None:
        self.copied: Any = None
        self.value = value.detach().to("cpu", non_blocking=value.is_cuda)  # into pinned memory; other devices wait
        if value.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(value.device))

    def arrived(self) -> bool:
        """Return whether it can be read without waiting."""
        return self.copied is None or self.copied.query()

    def read(self) -> float:
        """Return the value, after waiting for it if need be."""
        if self.copied is not None:
            self.copied.synchronize()
        return float(self.value)


class HostCopies:
    """Queue scalars on their way to the host, each with a note; the oldest is read first."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[HostCopy, Any]] = deque()

    def add(self, value: Tensor, note: Any) -> None:
        """Send a scalar on its way."""
        self.waiting.append((HostCopy(value), note))

    def read(self, wait: bool = False) -> Iterator[tuple[float, Any]]:
        """Yield scalars and their notes: those that have arrived, and all but the last few; or all."""
        while self.waiting and (wait or len(self.waiting) > _LONGEST or self.waiting[0][0].arrived()):
            copy, note = self.waiting.popleft()
            yield copy.read(), note


def before_saving(engine: Engine, read_all: Callable[[Engine], None]) -> None:
    """Call `read_all` at the end of each epoch, before validation, and whenever a state is about to be saved."""
    engine.register_events(*ReadingEvents)
    engine.add_event_handler(Events.EPOCH_COMPLETED | Events.COMPLETED | ReadingEvents.READ_ALL, read_all)
