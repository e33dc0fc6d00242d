"""Tell whether scans are preprocessed as published, or in a way that a store must note."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import PurePath
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser

PUBLISHED = [
    {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
    {"_target_": "Spacingd", "keys": "image", "pixdim": "@spacing", "mode": "bilinear"},
    {
        "_target_": "shared_networks.transforms.intensity.ScaleByModalityd",
        "keys": "image",
        "modality": "@modality",
        "intensity_range": "@intensity_range",
    },
]
"""The transforms of `configs/prepare.json`."""


def other_preprocessing(preprocessing: Any, **settings: Any) -> dict[str, str]:
    """Return what settings of a store say of its preprocessing: nothing of the published one.

    So stores of the published one, whose settings have never named it, stay as they are under every MONAI.

    Args:
        preprocessing: a transform.
        settings: `modality`, `spacing` and `intensity_range`, which the published one depends on.

    Returns:
        `{"preprocessing": digest}` of any other.
    """
    config = {**settings, "preprocessing": {"_target_": "Compose", "transforms": PUBLISHED}}
    published = _digest(ConfigParser(config).get_parsed_content("preprocessing"))
    found = _digest(preprocessing)
    return {} if found == published else {"preprocessing": found}


def _digest(transform: Any) -> str:
    return hashlib.sha256(json.dumps(_describe(transform), sort_keys=True).encode()).hexdigest()[:12]


def _describe(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Return a value as JSON that is the same in every process: an object by its class and attributes."""
    if value is None or isinstance(value, (bool, np.bool_)):
        return value if value is None else bool(value)
    if isinstance(value, (str, PurePath)):
        return str(value)
    if isinstance(value, (int, float, np.number)):
        return float(value)  # whether HU were given as 250 or 250.0
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return _describe(value.tolist())
    if isinstance(value, (type, np.dtype, torch.dtype)):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if id(value) in above:
        return type(value).__qualname__
    above = (*above, id(value))
    if isinstance(value, FunctionType):
        enclosed = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__qualname__, *_describe([value.__code__, value.__defaults__, enclosed], above)]
    if isinstance(value, CodeType):
        return [value.co_code.hex(), list(value.co_names), _describe(value.co_consts, above)]
    if isinstance(value, partial):
        return _describe([value.func, value.args, value.keywords], above)
    if isinstance(value, Mapping):
        return {str(key): _describe(item, above) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(item, above) for item in value]
    return [type(value).__qualname__, _describe(getattr(value, "__dict__", {}), above)]
