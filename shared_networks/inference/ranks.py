"""Share the cases of a run among processes, as `torchrun` starts them on one machine or several."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_FOR_EVER = timedelta(days=365)  # the last case of another process may take long; torchrun ends all if one fails


class Ranks:
    """The processes of a run. They meet in torchrun's own store, so that neither nccl nor gloo is needed.

    Without torchrun there is one process, which gets all cases in order.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.store: Any = None
        self.runs = 0

    def deal(self, sizes: Sequence[int]) -> Iterator[int]:
        """Deal cases out one by one, to whichever process asks next, so that none waits for the others.

        Args:
            sizes: of the cases in bytes, the same in all processes. The largest are dealt first, as the last one to be
                dealt is the one that others wait for.

        Yields:
            Indices of this process' cases.
        """
        if self.size == 1:
            yield from range(len(sizes))
            return
        order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
        self.runs += 1  # a run that is started again deals anew
        while (taken := self._shared().add(f"cases {self.runs}", 1) - 1) < len(order):
            yield order[taken]

    def gather(self, name: str, content: Any) -> list[Any]:
        """Give what each process found to the first.

        Args:
            name: of what is gathered, once a run.
            content: JSON.

        Returns:
            In the first process, each process' content, by rank; in the others nothing.
        """
        if self.size == 1:
            return [content]
        keys = [f"{name} {self.runs} {rank}" for rank in range(self.size)]
        store = self._shared()
        store.set(keys[self.rank], json.dumps(content))
        if self.rank:
            store.wait([f"{name} {self.runs} read"], _FOR_EVER)  # the store may end with the first process
            return []
        store.wait(keys, _FOR_EVER)
        gathered = [json.loads(store.get(key)) for key in keys]
        store.set(f"{name} {self.runs} read", "")
        return gathered

    def _shared(self) -> Any:
        if self.store is None:
            store, _, _ = next(iter(dist.rendezvous("env://")))
            self.store = dist.PrefixStore(f"ranks {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        return self.store
