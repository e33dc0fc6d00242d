"""Say what is installed: versions, bundles, weights and devices."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from shared_networks.datasets.record import file_digest
from shared_networks.doors.bundles import all_bundles
from shared_networks.files import read_json
from shared_networks.settings.kinds import device_names
from shared_networks.version import __version__

PACKAGES = ("torch", "monai", "nibabel", "numpy", "pytorch-ignite", "fire", "SimpleITK", "pydicom", "safetensors")
"""Whose versions a report of a problem needs; the last three are optional."""


def installation() -> dict[str, Any]:
    """Return what is installed.

    Returns:
        `version` of this package, `python` and `platform`; `packages`, versions by name, None where one is missing;
        `bundles`, by name each with `version`, `folder`, and `weights`, SHA-256 by file; and `devices`, by name what
        they are, which PyTorch alone knows.
    """
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "bundles": {
            name: {
                "version": read_json(folder / "configs" / "metadata.json")["version"],
                "folder": str(folder),
                "weights": {file.name: file_digest(file) for file in sorted((folder / "weights").glob("*.pt"))},
            }
            for name, folder in all_bundles().items()
        },
        "devices": _devices(),
    }


def as_text(found: dict[str, Any]) -> str:
    """Return :func:`installation` as lines for people."""
    lines = [f"hi-end-mae {found['version']}, Python {found['python']}, {found['platform']}", "", "packages"]
    lines += [f"  {name:15} {version or 'not installed'}" for name, version in found["packages"].items()]
    lines += ["", "bundles"]
    for name, bundle in found["bundles"].items():
        lines.append(f"  {name} {bundle['version']} in {bundle['folder']}")
        lines += [f"    weights/{file}  SHA-256 {digest}" for file, digest in bundle["weights"].items()]
    lines += ["", "devices", *(f"  {name:15} {what}" for name, what in found["devices"].items())]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    return {
        name: torch.cuda.get_device_name(name) if name.startswith("cuda") else platform.machine()
        for name in device_names()
    }
