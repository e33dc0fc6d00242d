"""Let one thread work on what another makes, a few items behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Full, Queue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_END: Any = object()
_SECONDS = 0.1  # between two looks at whether the other thread has failed


def consume_in_background(
    consume: Callable[[Iterator[Item]], Result], items: Iterable[Item], ahead: int
) -> Future[Result]:
    """Make items in this thread, and consume them in another.

    MONAI's `ThreadBuffer` is the other way round, and ends without a word if its source fails.

    Args:
        consume: takes all items, in order, and returns a result.
        items: are made one by one, in this thread.
        ahead: items that wait to be consumed, at most; more are not made.

    Returns:
        What `consume` returns or raises, once it has consumed the last items. It has failed if fewer items were made.

    Raises:
        Exception: as making an item raises; consuming then ends too.
    """
    waiting: Queue[Item] = Queue(ahead)

    def put(item: Item, consumer: Future[Result]) -> bool:
        while not consumer.done():
            try:
                waiting.put(item, timeout=_SECONDS)
                return True
            except Full:
                continue
        return False

    thread = ThreadPoolExecutor(1)
    consumer = thread.submit(consume, iter(waiting.get, _END))
    try:
        for item in items:
            if not put(item, consumer):  # it has failed
                break
    finally:
        put(_END, consumer)
        thread.shutdown(wait=False)
    return consumer
