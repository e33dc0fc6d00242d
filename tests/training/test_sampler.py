from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from monai.data import DataLoader
from monai.transforms import Compose, Lambdad, RandScaleIntensityd

from shared_networks.errors import InputError
from shared_networks.training.sampler import SeededCacheDataset, SeededSampler, derived_seed, share_of_cases


def sampler(length: int = 5, rank: int = 0, world: int = 1, epoch: int = 1, seed: int = 0) -> SeededSampler:
    made = SeededSampler(range(length), num_replicas=world, rank=rank, seed=seed)  # type: ignore[arg-type]
    made.set_epoch(epoch)
    return made


def test_derived_seeds_depend_on_every_number_and_its_place() -> None:
    seeds = [derived_seed(*numbers) for numbers in ((0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1), (0, 1, 3))]
    assert len(set(seeds)) == 5
    assert derived_seed(0, 1, 2) == seeds[0]
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_an_epoch_shows_every_case_once_in_a_new_order() -> None:
    orders = [[draw.case for draw in sampler(20, epoch=epoch)] for epoch in (1, 2, 3)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert all(a != b for a, b in pairwise(orders))


def test_no_two_draws_repeat_in_any_epoch_process_or_seed() -> None:
    draws = [
        draw.seed
        for seed in (0, 1)
        for epoch in range(1, 30)
        for rank in range(3)
        for draw in sampler(10, rank=rank, world=3, epoch=epoch, seed=seed)
    ]
    assert len(draws) == 2 * 29 * 12  # 10 cases are padded to 12, so that each process has four
    assert len(set(draws)) == len(draws)


def test_processes_share_the_cases() -> None:
    shares = [[draw.case for draw in sampler(10, rank=rank, world=2)] for rank in (0, 1)]
    assert Counter(shares[0] + shares[1]) == Counter(range(10))


def test_one_process_evaluates_all_cases() -> None:
    """Of several see tests/workflows/test_ranks.py."""
    assert list(share_of_cases(range(3))) == [0, 1, 2]


def test_processes_that_know_nothing_of_each_other_do_not_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"torchrun started 3 processes.* add 'configs/multi_gpu.json'"):
        share_of_cases(range(3))


def test_start_leaves_out_what_was_done_once() -> None:
    whole, later = list(sampler(7)), sampler(7)
    later.start = 3
    assert list(later) == whole[3:]
    assert list(later) == whole
    assert len(later) == 7


def noisy(cache_rate: float = 0.0) -> SeededCacheDataset:
    transform = Compose([Lambdad("x", np.asarray), RandScaleIntensityd("x", factors=0.5, prob=1.0)])
    return SeededCacheDataset([{"x": np.ones(1, np.float32)} for _ in range(6)], transform, cache_rate)


def values(dataset: SeededCacheDataset, workers: int, epoch: int = 1, start: int = 0) -> list[float]:
    order = sampler(len(dataset), epoch=epoch)
    order.start = start
    loader = DataLoader(dataset, batch_size=2, sampler=order, num_workers=workers)
    return [float(value) for batch in loader for value in batch["x"][:, 0]]


@pytest.mark.parametrize("start", [0, 2])
def test_draws_are_the_same_whatever_loads_them(start: int) -> None:
    alone = values(noisy(), 0)
    assert values(noisy(), 2, start=start) == alone[start:]
    assert values(noisy(cache_rate=1.0), 0, start=start) == alone[start:]
    assert len(set(alone + values(noisy(), 0, epoch=2))) == 12


def test_a_data_set_without_random_transform_is_read_as_it_is() -> None:
    dataset = SeededCacheDataset([3, 4], lambda item: item + 1, cache_rate=0.0)
    assert [dataset[draw] for draw in sampler(2)] in ([4, 5], [5, 4])
