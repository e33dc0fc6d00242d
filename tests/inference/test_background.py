from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from shared_networks.inference.background import consume_in_background

PATIENCE = 60


def test_items_are_consumed_in_order_in_another_thread() -> None:
    def consume(items: Iterator[int]) -> tuple[list[int], bool]:
        return list(items), threading.current_thread() is threading.main_thread()

    assert consume_in_background(consume, iter(range(50)), 2).result() == (list(range(50)), False)
    assert consume_in_background(consume, [], 2).result() == ([], False)


def test_no_more_items_are_made_than_may_wait() -> None:
    made: list[int] = []
    go_on = threading.Event()

    def items() -> Iterator[int]:
        for number in range(8):
            made.append(number)
            if len(made) == 4:  # one is consumed, two wait, and this one is made; the others are not before it goes on
                go_on.set()
            yield number

    def consume(items: Iterator[int]) -> int:
        first = next(items)
        assert go_on.wait(PATIENCE)
        assert len(made) == 4
        return first + sum(items)

    assert consume_in_background(consume, items(), 2).result() == sum(range(8))


def test_error_of_either_side_ends_both() -> None:
    ended = threading.Event()

    def consume(items: Iterator[int]) -> None:
        for _ in items:
            pass
        ended.set()

    def items(last: int) -> Iterator[int]:
        yield from range(last)
        raise ValueError("made none")

    with pytest.raises(ValueError, match="made none"):
        consume_in_background(consume, items(5), 1)
    assert ended.wait(PATIENCE)

    def fail(items: Iterator[int]) -> None:
        raise ValueError(f"cannot take {next(items)}")

    with pytest.raises(ValueError, match="cannot take 0"):
        consume_in_background(fail, iter(range(1000)), 1).result()
