"""Declare what a setting takes: numbers within limits, lists, paths, choices."""

from __future__ import annotations

import math
import os
import re
from ast import literal_eval
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

_ITEM = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,]*?)\s*(?:,|$)""")
_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class Kind(NamedTuple):
    """What a setting takes.

    Attributes:
        read: makes the value from text or from a value of a config; raises ValueError where it cannot.
        expected: what to give, in words that follow "give"; a function where it depends on the machine.
        native: types of the values that MONAI may have made of the text without harm, for deeper settings.
        as_typed: the text is the value, even where it begins with `$`, `@` or `%`.
    """

    read: Callable[[Any], Any]
    expected: str | Callable[[], str]
    native: tuple[type, ...]
    as_typed: bool = False


def _items(value: Any) -> list[Any]:
    """The items of a list or array, of a text such as `[a, 'b, c']` or `a,b`, or of a single value."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str):
        return [value]
    text = value.strip()
    if text[:1] in ("[", "("):
        if text[-1:] != {"[": "]", "(": ")"}[text[0]]:
            raise ValueError
        text = text[1:-1].strip()
    items, start = [], 0
    while start < len(text):
        found = _ITEM.match(text, start)
        if not found:
            raise ValueError
        items.append(_unquoted(found[1]))
        start = found.end()
    return items


def _unquoted(text: str) -> str:
    """The content of a text in quotes of its own, which MONAI's command line asks for here and there."""
    if re.fullmatch(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", text):
        return str(literal_eval(text))
    return text


def _number(value: Any) -> float:
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        value = value.item()  # JSON, which records hold, knows Python's numbers alone
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, str):
        value = int(value) if re.fullmatch(r"\s*[+-]?[\d_]+\s*", value) else float(value)
    if not math.isfinite(value):
        raise ValueError
    return value


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _flag(value: Any) -> bool:
    text = str(value).strip().casefold()
    if text not in _YES + _NO:
        raise ValueError
    return text in _YES


def _path(value: Any) -> str:
    if isinstance(value, (bool, list, tuple, dict, type(None))):
        raise ValueError
    return _unquoted(value) if isinstance(value, str) else str(value)


def _device(value: Any) -> torch.device:
    try:
        device = torch.device(value if isinstance(value, torch.device) else str(value).strip())
    except RuntimeError:
        raise ValueError from None
    if (device.index or 0) >= _devices().get(device.type, 0):
        raise ValueError
    return device


def _devices() -> dict[str, int]:
    """Return the number of the devices of this machine, by type."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}


def device_names() -> list[str]:
    """Return the devices of this machine, such as `["cpu", "cuda:0"]`."""
    return [f"{kind}:{index}" if kind == "cuda" else kind for kind, n in _devices().items() for index in range(n)]


def _expected_device() -> str:
    return f"a device of this machine: {', '.join(device_names())}"


def number(expected: str, fits: Callable[[float], bool]) -> Kind:
    """Declare a number within limits."""

    def read(value: Any) -> float:
        result = _number(value)
        if not fits(result):
            raise ValueError
        return result

    return Kind(read, expected, (int, float))


def whole(expected: str, fits: Callable[[int], bool]) -> Kind:
    """Declare a whole number within limits."""

    def read(value: Any) -> int:
        result = _whole(value)
        if not fits(result):
            raise ValueError
        return result

    return Kind(read, expected, (int,))


def three(item: Kind, expected: str, repeat: bool = True) -> Kind:
    """Declare three values, for the axes left-right, back-front and foot-head, or one for all three."""

    def read(value: Any) -> list[Any]:
        values = [item.read(part) for part in _items(value)]
        if repeat and len(values) == 1:
            values *= 3
        if len(values) != 3:
            raise ValueError
        return values

    return Kind(read, expected, (list, tuple))


def ascending(expected: str) -> Kind:
    """Declare two numbers, the lower one first."""

    def read(value: Any) -> list[float]:
        values = [_number(part) for part in _items(value)]
        if len(values) != 2 or not values[0] < values[1]:
            raise ValueError
        return values

    return Kind(read, expected, (list, tuple))


def list_of(item: Kind, expected: str, distinct: bool = False, least: int = 0) -> Kind:
    """Declare a list, or one item for a list of it."""

    def read(value: Any) -> list[Any]:
        values = [item.read(part) for part in _items(value)]
        if len(values) < least or (distinct and len(set(values)) < len(values)):
            raise ValueError
        return values

    return Kind(read, expected, (list, tuple))


def choice(*names: str) -> Kind:
    """Declare one of a few words."""

    def read(value: Any) -> str:
        return {name.casefold(): name for name in names}.get(str(value).strip().casefold()) or _refused()

    return Kind(read, " or ".join((", ".join(names[:-1]), names[-1])), (str,))


def by_name(item: Kind, expected: str) -> Kind:
    """Declare a value for all, or a mapping from names to one for each."""

    def read(value: Any) -> Any:
        if isinstance(value, str) and value.strip()[:1] == "{":
            try:
                value = literal_eval(value.strip())
            except SyntaxError:
                raise ValueError from None
        if not isinstance(value, dict):
            return item.read(value)
        return {_name(key): item.read(part) for key, part in value.items()}

    return Kind(read, expected, (*item.native, dict))


def optional(kind: Kind) -> Kind:
    """Allow None, or null, for none."""

    def read(value: Any) -> Any:
        return None if value is None or value in ("None", "null") else kind.read(value)

    expected = kind.expected
    return Kind(read, f"{expected}, or None", (*kind.native, type(None)), kind.as_typed)


def _refused() -> Any:
    raise ValueError


def _name(value: Any) -> str:
    text = _unquoted(value.strip()) if isinstance(value, str) else str(value)
    return text or _refused()


def _file_list(value: Any) -> list[str]:
    """Paths: in brackets as a list, else the one that the text is, with its commas."""
    if isinstance(value, str):
        bracketed = value.strip()[:1] == "[" and not os.path.exists(value)
        value = _items(value) if bracketed else [value] if value.strip() else []
    return [_path(item) for item in _items(value)]


def _patch(value: Any) -> int | list[int]:
    sizes = [COUNT.read(part) for part in _items(value)]
    if len(sizes) not in (1, 3):
        raise ValueError
    return sizes[0] if len(sizes) == 1 else sizes


def _organ(value: Any) -> str | int:
    try:
        return NOT_NEGATIVE.read(value)
    except ValueError:
        return _name(value)


def _number_type(value: Any) -> torch.dtype | None:
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None, "None": None}
    name = str(value).removeprefix("torch.")
    return types[name] if name in types else _refused()


FLAG = Kind(_flag, "True or False", (bool,))
COUNT = whole("a whole number of at least 1", lambda n: n >= 1)
NOT_NEGATIVE = whole("a whole number of at least 0", lambda n: n >= 0)
SEED = whole("a whole number from 0 to 4294967295", lambda n: 0 <= n < 2**32)
POSITIVE = number("a number above 0", lambda x: x > 0)
AMOUNT = number("a number of at least 0", lambda x: x >= 0)
SHARE = number("a number from 0 to 1", lambda x: 0 <= x <= 1)
BELOW_ONE = number("a number of at least 0 and below 1", lambda x: 0 <= x < 1)
ANY_TEXT = Kind(_path, "a text", (str,), as_typed=True)
PATH = Kind(lambda value: _path(value) or _refused(), "a path", (str,), as_typed=True)
PATH_OR_NONE = Kind(_path, "a path, or '' for none", (str,), as_typed=True)
FILES = Kind(_file_list, "a path, or a list such as \"['a.pt','b.pt']\"", (list, tuple), as_typed=True)
AXES = list_of(
    whole("an axis", lambda n: n in (0, 1, 2)),
    "axes out of 0 (left-right), 1 (back-front) and 2 (foot-head), such as [1,2], or [] for none",
    distinct=True,
)
NAME = Kind(_name, "a name", (str,))
NAMES = list_of(NAME, "a list of names, such as [case_1,case_2]")
LABELS = list_of(NAME, "a list of two names or more, such as \"['background','liver']\"", least=2)
NUMBER_TYPE = Kind(_number_type, "bfloat16, float16 or float32", ())
DEVICE = Kind(_device, _expected_device, (str,))
PATCH_SIZE = Kind(_patch, "a whole number of at least 1, or three", (int, list, tuple))
ORGAN = Kind(_organ, "a label's name or value", (str, int))
