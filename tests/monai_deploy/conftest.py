"""A release in the real MONAI Deploy App SDK, and what `bundle run` makes of the same scans.

Run by `./runtests.sh --deploy` alone, which makes the SDK's environment: in it there is no `shared_networks` but the
bundle's own copy.
"""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave these tests out unless they are asked for by name."""
    return None if any("monai_deploy" in str(argument) for argument in config.args) else True
