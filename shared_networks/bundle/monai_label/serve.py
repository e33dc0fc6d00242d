"""Start MONAI Label's own server on release zips of the bundles, in an environment with requirements.txt.

    python serve.py --app APP --studies STUDIES hi_end_mae_btcv_seg_v0.1.0.zip hi_end_mae_flare_seg_v0.1.0.zip

APP is made where it is not there: a copy of MONAI Label's app `monaibundle`, the zips unpacked in its folder `model`.
A zip is unpacked only if its files are those of its SHA256SUMS. An unpacked bundle stays unchanged, as it may have been
trained since. The server listens to this machine alone unless `--host` says otherwise. Further options go to
`monailabel start_server`: `--port 8000`, `--conf skip_trainers true`. docs/monai_label.md says how to do this by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile


def install(bundle: str, app: Path) -> str:
    """Unpack a release zip into the app, all of it or nothing, and return the name of its bundle.

    Args:
        bundle: the zip, or the name of a bundle that is in the app already.
        app: MONAI Label's app.

    Raises:
        SystemExit: in one line: there is no such zip or bundle, the zip is no release or was changed since, or it
            cannot be unpacked.
    """
    if (app / "model" / bundle).is_dir():
        return bundle
    try:
        with ZipFile(bundle) as archive:
            name = check_release(archive)
            if (app / "model" / name).exists():
                print(f"{app / 'model' / name} exists already and stays unchanged", flush=True)
            else:
                (app / "model").mkdir(parents=True, exist_ok=True)
                with TemporaryDirectory(prefix=".unfinished_", dir=app / "model") as unfinished:
                    archive.extractall(unfinished)
                    os.replace(Path(unfinished, name), app / "model" / name)
    except (OSError, BadZipFile, ValueError) as error:
        raise SystemExit(f"error: {bundle}: {error}") from None
    return name


def copy_app(source: Path, app: Path) -> None:
    """Copy MONAI Label's app, all of it or nothing, to where there is none or an empty folder.

    Raises:
        SystemExit: in one line: it is not installed, or cannot be written.
    """
    if app.is_dir() and any(app.iterdir()):
        return
    try:
        app.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".unfinished_", dir=app.parent) as unfinished:
            os.replace(shutil.copytree(source, Path(unfinished, app.name)), app)
    except OSError as error:
        raise SystemExit(f"error: {app}: {' '.join(str(error).split())[:500]}") from None


def check_release(archive: ZipFile) -> str:
    """Compare the files of a release zip with its checksums, and return the name of its one folder.

    Raises:
        ValueError: an entry lies elsewhere, there are no checksums, or a file is changed, missing or not listed.
    """
    entries = [entry for entry in archive.namelist() if not entry.endswith("/")]
    name = entries[0].split("/")[0] if entries else ""
    for entry in entries:
        parts = PurePosixPath(entry).parts
        if len(parts) < 2 or parts[0] != name or ".." in parts or name in (".", "..") or "\\" in entry:
            raise ValueError(f"{entry} lies outside of one folder; this is no release, do not unpack it")
    listed = f"{name}/SHA256SUMS"
    if listed not in entries:
        raise ValueError("no SHA256SUMS in it; give a zip that shared_networks.bundle.release made")
    lines = [line.partition("  ") for line in archive.read(listed).decode().splitlines()]
    sums = {f"{name}/{path}": digest for digest, _, path in lines}
    changed = [
        entry
        for entry in sorted(sums.keys() | set(entries) - {listed})
        if entry not in entries or hashlib.sha256(archive.read(entry)).hexdigest() != sums.get(entry)
    ]
    if changed:
        raise ValueError(f"{len(changed)} file(s) not as in SHA256SUMS, such as {changed[0]}; download it again")
    return name


def without_operators() -> bool:
    """Return whether torchvision does not import, because its operators are compiled for another build of torch.

    That is so where torch is its CPU build, and of torchvision there is only the CUDA build. MONAI Label imports it to
    draw grids of images, for which it needs no operator.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        return "operator torchvision::" in str(error)
    return False


def without_pydicom_seg() -> bool:
    """Return whether pydicom-seg does not import, because pydicom 3 has lost a module of pydicom 2.

    MONAI Label imports it to read DICOM SEG, which highdicom does as well.
    """
    try:
        import pydicom_seg  # noqa: F401
    except ModuleNotFoundError as error:
        return error.name == "pydicom._storage_sopclass_uids"
    return False


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the server and of the processes that it trains in."""
    changed = dict(given)
    changed.setdefault("BUNDLE_DOWNLOAD_SRC", "ngc")  # by default GitHub is asked for models, even for local ones
    changed["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), given.get("PATH", "")])  # torchrun
    stand_ins = ["torchvision_without_operators"] if without_operators() else []
    stand_ins += ["pydicom_seg_by_highdicom"] if without_pydicom_seg() else []
    if stand_ins:
        folders = [str(Path(__file__).resolve().with_name(name)) for name in stand_ins]
        changed["PYTHONPATH"] = os.pathsep.join([*folders, given.get("PYTHONPATH", "")])
    return changed


def main() -> None:
    """Install and start; the server takes the place of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--app", type=Path, required=True)
    parser.add_argument("--studies", required=True, help="folder of scans, or address of a DICOMweb server")
    parser.add_argument("bundles", nargs="+", help="zips, or names of bundles in APP/model")
    own, options = parser.parse_known_args()
    copy_app(Path(sys.prefix) / "monailabel" / "sample-apps" / "monaibundle", own.app)
    names = [install(bundle, own.app) for bundle in own.bundles]
    words = ["--app", str(own.app), "--studies", own.studies, "--conf", "models", ",".join(names)]
    words += ["--conf", "sam2", "false"]  # Segment Anything would be downloaded
    words += ["--host", "127.0.0.1", *options]  # the last one counts
    words = [sys.executable, "-m", "monailabel.main", "start_server", *words]
    os.execve(sys.executable, words, environment(os.environ))


if __name__ == "__main__":
    main()
