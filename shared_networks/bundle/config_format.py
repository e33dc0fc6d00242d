"""Write configs as JSON in one layout: what fits into a line stands in a line."""

from __future__ import annotations

import json
from typing import Any

WIDTH = 120
_INDENT = 4


def format_config(content: Any) -> str:
    """Return JSON, indented by four spaces, in which each dict or list of plain values that fits stands in a line.

    Args:
        content: of a config.
    """
    return _format(content, 0, 0) + "\n"


def _format(value: Any, depth: int, before: int) -> str:
    """Format a value at a depth, with `before` characters of its line taken already."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or not value:
        return line
    if depth and _is_flat(value) and before + len(line) < WIDTH:  # and a comma
        return line
    inside = " " * _INDENT * (depth + 1)
    if isinstance(value, dict):
        keys = [f"{json.dumps(key, ensure_ascii=False)}: " for key in value]
        items = [key + _format(v, depth + 1, len(inside + key)) for key, v in zip(keys, value.values(), strict=True)]
    elif all(not isinstance(item, (dict, list)) for item in value):
        return (
            "[\n" + _filled([json.dumps(item, ensure_ascii=False) for item in value], inside) + f"\n{inside[_INDENT:]}]"
        )
    else:
        items = [_format(item, depth + 1, len(inside)) for item in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n" + ",\n".join(inside + item for item in items) + f"\n{inside[_INDENT:]}{end}"


def _filled(items: list[str], inside: str) -> str:
    """Break a list of plain values into lines that are as full as possible."""
    lines = [inside]
    for index, item in enumerate(items):
        text = item + ("," if index < len(items) - 1 else "")
        if len(lines[-1]) > len(inside) and len(lines[-1]) + 1 + len(text) > WIDTH:
            lines.append(inside)
        lines[-1] += (" " if len(lines[-1]) > len(inside) else "") + text
    return "\n".join(lines)


def _is_flat(value: Any) -> bool:
    """Return whether a dict or list holds plain values and lists of them, and no dict."""
    items = value.values() if isinstance(value, dict) else value
    return not any(isinstance(item, dict) or (isinstance(item, list) and not _is_flat(item)) for item in items)
