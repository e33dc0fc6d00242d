"""Tell the options of a command line from its other words, as fire does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest

OPTION = re.compile(r"--|-[a-zA-Z]")
"""Begins an option; "-175" is a value."""


def command_line_options(arguments: Sequence[str]) -> dict[str, str | bool]:
    """Read options as fire does.

    Args:
        arguments: the words after `run`, such as `["--dataset-dir", "/data", "--net#width=8", "--noamp"]`.

    Returns:
        Their texts by name, or True or False without a text, here
        `{"dataset_dir": "/data", "net#width": "8", "amp": False}`.
    """
    return _split(arguments)[0]


def positional_words(arguments: Sequence[str]) -> list[str]:
    """Return the words that are neither options nor their values; arguments as `command_line_options`."""
    return _split(arguments)[1]


def _split(arguments: Sequence[str]) -> tuple[dict[str, str | bool], list[str]]:
    words = list(arguments)
    if "--" in words:  # what follows the last one is for fire itself
        words = words[: len(words) - 1 - words[::-1].index("--")]
    options: dict[str, str | bool] = {}
    positional = []
    taken = False
    for word, following in zip_longest(words, words[1:], fillvalue="--"):
        if taken or not OPTION.match(word):
            positional += [] if taken else [word]
            taken = False
            continue
        key, equals, text = word.lstrip("-").partition("=")
        key = key.replace("-", "_")
        value: str | bool = text
        if not equals and not OPTION.match(following):
            value, taken = following, True
        elif not equals:
            key, value = (key[2:], False) if key.startswith("no") else (key, True)
        options[key] = value
    return options, positional
