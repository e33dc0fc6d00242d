"""Sample cases so that every random draw depends only on seed, epoch and position.

A crop depends on the seed, the epoch and its place in the epoch's order, and on nothing else: no two places, processes
or epochs repeat a draw, the number of loading processes does not matter, and training that was interrupted goes on with
the draws that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from monai.transforms import Randomizable
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler


class Draw(NamedTuple):
    """One item of an epoch: the number of a case, and the seed of what is random about it."""

    case: int
    seed: int


def derived_seed(*numbers: int) -> int:
    """Mix non-negative numbers, such as (seed, epoch, place), into a seed of 32 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class DrawSampler(DistributedSampler):
    """Shuffles the cases anew each epoch, shares them among the processes and gives each draw its own seed.

    Arguments are those of :class:`torch.utils.data.DistributedSampler`; MONAI's trainer calls `set_epoch`. With
    `num_replicas=1` it serves a single process.

    Attributes:
        start: items of this process to leave out of the next epoch, as they were done before an interruption.
    """

    start = 0

    def __iter__(self) -> Iterator[Draw]:  # type: ignore[override]
        """Yield this process's share of the epoch."""
        start, self.start = self.start, 0
        # A case that pads the last batch for even shares has two places, so its draws differ too.
        places = range(self.rank, self.total_size, self.num_replicas)
        shares = zip(places, super().__iter__(), strict=True)
        for number, (place, index) in enumerate(shares):
            if number >= start:
                yield Draw(index, derived_seed(self.seed, self.epoch, place))


class SeededDataset(Dataset):
    """A MONAI data set that takes a :class:`Draw` in place of an index.

    Args:
        dataset: data set with a random `transform`, such as :class:`monai.data.CacheDataset`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Any:
        """Seed the transform, then apply it to the case."""
        transform = self.dataset.transform
        if isinstance(transform, Randomizable):
            transform.set_random_state(draw.seed)
        return self.dataset[draw.case]
