"""Put the bundles into the wheel; all else is in pyproject.toml.

They lie beside the package in the source tree, and in `shared_networks/doors/shipped` of a wheel. An editable
installation finds them in the source tree.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from shared_networks.version import RELEASED_FILES, released_content  # noqa: E402


class BuildWithBundles(build_py):
    """Build the package with the bundles."""

    def bundle_files(self) -> list[str]:
        """Return what of the bundles is released, relative to the source tree."""
        bundles = {file.parts[-3] for file in ROOT.glob("*/configs/metadata.json")}
        files = [file for name in bundles for pattern in RELEASED_FILES for file in (ROOT / name).glob(pattern)]
        return sorted(file.relative_to(ROOT).as_posix() for file in files if file.is_file())

    def shipped(self) -> dict[str, str]:
        """Return the files to be written, by the source of each."""
        folder = Path(self.build_lib, "shared_networks", "doors", "shipped")
        return {} if self.editable_mode else {file: str(folder / file) for file in self.bundle_files()}

    def run(self) -> None:
        """Copy the package and the bundles."""
        super().run()
        for source, target in self.shipped().items():
            self.mkpath(str(Path(target).parent))
            Path(target).write_bytes(released_content(ROOT / source))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return all files that are written."""
        return [*super().get_outputs(include_bytecode), *self.shipped().values()]

    def get_source_files(self) -> list[str]:
        """Return all files that a source distribution needs."""
        return [*super().get_source_files(), *self.bundle_files()]


setup(cmdclass={"build_py": BuildWithBundles})
