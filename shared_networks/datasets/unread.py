"""Say of files beside scans why they are not read, where they could be scans; of all others nothing."""

from __future__ import annotations

import gzip
import os
import re
import zlib

from shared_networks.datasets.dicom import begins_as_dicom

_FORMATS = (".mha", ".mhd", ".nrrd", ".nhdr", ".hdr", ".img", ".mgz", ".mgh")
_ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tar.gz", ".tgz", ".bz2", ".xz", ".zst")
_DICOM = (".dcm", ".dicom", ".ima")
_OTHER_CONTENT = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"%PDF", b"\x7fELF", b"MZ", b"SQLite format 3")
_ARCHIVED = (b"PK\x03\x04", b"7z\xbc\xaf\x27\x1c", b"Rar!", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_ARCHIVE = "an archive, which is not read; unpack it"


def unread_name(file: str) -> str:
    """Return why a file is not read, where its name says it: another format, or an archive."""
    name = os.path.basename(file).casefold()
    if name.endswith(_FORMATS):
        return "neither NIfTI nor DICOM; convert it to .nii.gz"
    return _ARCHIVE if name.endswith(_ARCHIVES) else ""


def unread_content(file: str) -> str:
    """Return why a file that could be a scan is not read; nothing of texts, pictures and other files that are none.

    Args:
        file: that is neither NIfTI by its name nor begins as DICOM.
    """
    name = os.path.basename(file).casefold()
    try:
        zipped, start = _start(file)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if _is_nifti(start):
        return f"NIfTI by its content and not by its name; let that end with {'.nii.gz' if zipped else '.nii'}"
    if zipped and begins_as_dicom(start):
        return "gzipped DICOM, which is not read; unpack it"
    # Series are often named by number or UID, whose last part looks like an ending.
    if re.search(r"\.[^.]*[^.\d][^.]*$", name) and not name.endswith((".gz", *_DICOM)):
        return ""
    if start[257:262] == b"ustar" or start.startswith(_ARCHIVED):
        return _ARCHIVE
    if name.endswith(_DICOM):
        return "DICOM by its name and not by its content; copy it again"
    if not start or start.startswith(_OTHER_CONTENT) or _is_text(start):
        return ""
    return "neither NIfTI nor DICOM by its content; convert it if it is a scan"


def _start(file: str) -> tuple[bool, bytes]:
    """Return whether a file is gzipped, and how its content begins."""
    with open(file, "rb") as stream:
        start = stream.read(540)
    if not start.startswith(b"\x1f\x8b"):
        return False, start
    try:
        with gzip.open(file) as stream:
            return True, stream.read(540)
    except (OSError, EOFError, zlib.error):
        return True, start


def _is_nifti(start: bytes) -> bool:
    sizes = {int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")}
    return (348 in sizes and start[344:347] == b"n+1") or (540 in sizes and start[4:7] == b"n+2")


def _is_text(start: bytes) -> bool:
    try:
        start[:-3].decode("utf-8")  # the end may cut a letter in two
    except UnicodeDecodeError:
        return False
    return b"\0" not in start
