"""Match the names of cases to be left out with the cases of a data set."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from shared_networks.errors import InputError


def find_excluded(cases: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, list[str]]:
    """Find the cases that names mean; in doubt a name means too many and not too few.

    Small and capital letters, file suffixes and a last `_0000` do not matter. A name without folders means every case
    with such a part in its id or with such a file. A name with folders means the cases within whose id or file it
    lies, part by part. Where there are none, it means those whose id or file ends it, as where a data set was moved;
    where there are none either, its last part is taken for a name without folders.

    Args:
        cases: by id, what else they go by: their NIfTI files, or the UID of their series.
        names: such as `img0035`, `imagesTr/img0035_0000.nii.gz` or `BTCV/imagesTr/img0035`.

    Returns:
        For each name the ids it means.
    """
    paths = {case: [_parts(name) for name in (case, *also)] for case, also in cases.items()}
    found = {}
    for name in names:
        parts = _parts(name)
        means: list[str] = []
        if len(parts) > 1:
            means = [case for case, known in paths.items() if any(_within(parts, path) for path in known)]
            means = means or [case for case, known in paths.items() if any(parts[-len(p) :] == p for p in known)]
        last = parts[-1] if parts else ""
        found[name] = means or [c for c, (own, *also) in paths.items() if last in own or last in [k[-1] for k in also]]
    return found


def read_names(file: str | Path) -> list[str]:
    """Read a list of cases: a name a line; what follows a # is a comment.

    Raises:
        InputError: there is no such file, or it is no text.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not readable as a list of cases ({error}); give a text file") from None
    return [name for line in lines if (name := re.sub(r"(^|\s)#.*", "", line).strip())]


def _bare(name: str) -> str:
    """A file or case name in small letters, without suffix and without the mark of the first channel."""
    name = name.casefold()
    for suffix in (".nii.gz", ".nii", ".npy"):
        name = name.removesuffix(suffix)
    return name.removesuffix("_0000")


def _parts(path: str) -> list[str]:
    return [_bare(part) for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]


def _within(parts: list[str], path: list[str]) -> bool:
    """Return whether one path lies within another."""
    return any(path[end - len(parts) : end] == parts for end in range(len(parts), len(path) + 1))
