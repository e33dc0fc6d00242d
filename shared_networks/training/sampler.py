"""Sample cases so that every random draw depends only on seed, epoch and position.

No two positions, processes or epochs repeat a draw, the number of loading processes does not matter, and training that
was interrupted continues with the draws that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from monai.data import CacheDataset, DataLoader
from monai.transforms import Randomizable
from torch.utils.data.distributed import DistributedSampler

from shared_networks.processes import check_processes


class Draw(NamedTuple):
    """One item of an epoch: the index of a case, and the seed of its random transforms."""

    case: int
    seed: int


def derived_seed(*numbers: int) -> int:
    """Mix non-negative numbers, such as (seed, epoch, position), into a seed of 32 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def share_of_cases(dataset: Sized) -> range:
    """Return the indices of the cases that this process evaluates, so that a mean over processes is one over cases.

    Without a process group these are all. Of fewer cases than processes each process has all: a process without a case
    would keep the others waiting, and a mean stays the same if all cases count equally often.

    Args:
        dataset: whose cases are shared, in their order.

    Raises:
        InputError: torchrun started several processes, and there is no process group.
    """
    several = dist.is_available() and dist.is_initialized()
    check_processes(several, "multi_gpu.json")
    rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    return range(rank, len(dataset), size) if len(dataset) >= size else range(len(dataset))


class SeededSampler(DistributedSampler):
    """Shuffle the cases anew each epoch, share them among the processes and give each draw its own seed.

    MONAI's trainer calls `set_epoch`. Without a process group it serves a single process.

    Args:
        dataset: whose cases are drawn.
        seed: of the run.
        num_replicas: processes; by default all of the process group.
        rank: of this process among them, likewise.

    Attributes:
        start: items of this process to skip in the next epoch, as they were done before an interruption.
    """

    start = 0

    def __init__(self, dataset: Any, seed: int = 0, num_replicas: int | None = None, rank: int | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            num_replicas, rank = num_replicas or 1, rank or 0
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)

    def __iter__(self) -> Iterator[Draw]:  # type: ignore[override]
        """Yield this process's share of the epoch."""
        start, self.start = self.start, 0
        # A case that pads the last batch for even shares has two positions, so its draws differ too.
        positions = range(self.rank, self.total_size, self.num_replicas)
        shares = zip(positions, super().__iter__(), strict=True)
        for number, (position, index) in enumerate(shares):
            if number >= start:
                yield Draw(index, derived_seed(self.seed, self.epoch, position))


class SeededCacheDataset(CacheDataset):
    """MONAI's `CacheDataset`, which also takes a :class:`Draw` for an index.

    Args:
        data: cases.
        transform: of a case; what is random in it is seeded by the draw.
        cache_rate: share of the cases whose deterministic transforms are done once; 0 shows no progress bar.
    """

    def __init__(self, data: Any, transform: Any, cache_rate: float = 1.0) -> None:
        super().__init__(data, transform, cache_rate=cache_rate, progress=cache_rate > 0)

    def __getitem__(self, index: Any) -> Any:
        """Seed the transform, if the index is a draw, then apply it to the case."""
        if not isinstance(index, Draw):
            return super().__getitem__(index)
        if isinstance(self.transform, Randomizable):
            self.transform.set_random_state(index.seed)
        return super().__getitem__(index.case)


class SeededDataLoader(DataLoader):
    """Load batches of seeded draws, with a :class:`SeededSampler`.

    Args:
        dataset: a :class:`SeededCacheDataset`.
        batch_size: cases of a batch.
        num_workers: loading processes, kept over epochs.
        seed: of the run.
    """

    def __init__(self, dataset: SeededCacheDataset, batch_size: int, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(
            dataset,
            num_workers=num_workers,
            batch_size=batch_size,
            sampler=SeededSampler(dataset, seed),
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
