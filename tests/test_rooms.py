"""The folders of the package stand in the order in which data travel; a file imports only from those before its own."""

from __future__ import annotations

import ast
import re

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "shared_networks"
GROUND = ("errors", "files", "processes", "version")
ORDER = ["settings", "datasets", "synthetic", "store", "transforms", "networks", "training", "figures", "inference"]
ORDER += ["evaluation", "bundle", "doors"]
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(source: str) -> set[tuple[str, str]]:
    """Modules of this package, and names, that a source imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("shared_networks."):
            found |= {(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.startswith("shared_networks.")}
    return found


def test_every_folder_has_its_place_and_nothing_else_is_loose() -> None:
    assert sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__") == sorted(
        ORDER
    )
    assert sorted(path.stem for path in PACKAGE.glob("*.py")) == sorted(["__init__", *GROUND])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_from_folders_before_its_own_alone(file) -> None:
    folder = file.relative_to(PACKAGE).parts[0]
    if folder == "__init__.py":
        return
    allowed = [*GROUND, *(ORDER[: ORDER.index(folder) + 1] if folder in ORDER else [])]
    modules = imported(file.read_text())
    assert [module for module, _ in modules if module.split(".")[1] not in allowed] == []
    private = [name for module, name in modules if name.startswith("_") and name != "__version__"]
    assert private == []


def test_there_are_few_arrows_between_folders() -> None:
    arrows = {
        (file.relative_to(PACKAGE).parts[0], module.split(".")[1])
        for file in FILES
        for module, _ in imported(file.read_text())
        if len(file.relative_to(PACKAGE).parts) > 1 and module.split(".")[1] in ORDER
    }
    assert len([arrow for arrow in arrows if arrow[0] != arrow[1]]) <= 25  # of 66 that the order allows


def test_files_are_short() -> None:
    lines = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in FILES}
    assert {file: count for file, count in lines.items() if count > 520} == {}


def test_tests_mirror_the_folders() -> None:
    assert [folder for folder in ORDER if not list((ROOT / "tests" / folder).glob("test_*.py"))] == []


def test_contributing_names_the_folders_in_this_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == ORDER


def test_networks_are_plain() -> None:
    """No private operator, no changed class; what is set for the process is set in cpu.py, and set back."""
    for file in (*(PACKAGE / "networks").glob("*.py"), *(PACKAGE / "training").glob("*.py")):
        source = file.read_text()
        words = ("__class__", "_conv_forward", "torch.ops.", "mallopt", "set_float32_matmul_precision", "ctypes")
        allowed = ("mallopt", "ctypes") if file.name == "cpu.py" else ()
        assert [word for word in words if word in source and word not in allowed] == [], file
