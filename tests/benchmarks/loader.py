"""How fast crops come from the store, what they read, and what ten thousand cases cost.

    python -m tests.benchmarks.loader [--out FOLDER] [--json FILE]

Prints Markdown, then JSON. Rates are crops a second of processor time (a core's), medians of repeats; wall time beside
them shows how busy the machine was. Volumes are noise of the size of an abdominal CT, which no cache or compression
helps.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
)

from shared_networks.files import write_json
from shared_networks.store.crops import RandReadCropsd
from shared_networks.store.format import (
    append_entry,
    centres_file,
    read_manifest,
    volume_file,
    write_array,
    write_manifest,
    write_volume,
)
from shared_networks.synthetic.phantom import phantom_case
from shared_networks.synthetic.tissue_table import phantom_tissues, table_content
from shared_networks.transforms.intensity import ScaleByModalityd
from shared_networks.transforms.synthesis import RandCropWarpd, RandDrawCTd

SHAPE = (1, 233, 167, 267)  # a body of 350 x 250 x 400 mm at 1.5 mm
SIZE, DRAWN = (96, 96, 96), (72, 72, 72)
VOLUMES, REPEATS, MANY = 8, 7, 10_000
PAGE = os.sysconf("SC_PAGE_SIZE")


def make_store(root: Path) -> list[dict[str, Any]]:
    """Prepared cases of noise, with every fourth voxel background."""
    random = np.random.default_rng(0)
    for number in range(VOLUMES):
        file = volume_file(root, f"v/{number}")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_volume(file, random.random(SHAPE, np.float32))
        write_array(centres_file(file), random.integers(0, SHAPE[1:], (2, 4096, 3)).astype(np.int16))
        append_entry(root, {"id": f"v/{number}", "shape": list(SHAPE), "centres": 4096, "settings": {}})
    return read_manifest(root)


def published(folder: Path, crops: int) -> Callable[[int], Any]:
    """A float32 tensor a volume, loaded whole, cropped and augmented by MONAI."""
    for number in range(VOLUMES):
        torch.save(torch.rand(SHAPE), folder / f"{number}.pt")
    keys = "image"
    augment = Compose(
        [
            RandCropByPosNegLabeld(keys, label_key=keys, spatial_size=SIZE, pos=6, neg=2, num_samples=crops),
            *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
            RandRotate90d(keys, prob=0.3, max_k=3),
            RandScaleIntensityd(keys, factors=0.1, prob=0.1),
            RandShiftIntensityd(keys, offsets=0.1, prob=0.1),
        ]
    )
    return lambda number: augment({keys: torch.load(folder / f"{number}.pt", weights_only=True)})


def drawn(root: Path, crops: int) -> Callable[[int], Any]:
    """A tissue map, cropped, warped and drawn as a CT."""
    tissue, label, affine = phantom_case(np.random.default_rng(0), voxel_mm=3, tissues=True)
    write_json(root / "tissues.json", table_content(phantom_tissues()))
    case = {
        key: MetaTensor(torch.from_numpy(volume)[None], affine=torch.from_numpy(affine))
        for key, volume in (("image", tissue), ("label", label))
    }
    transform = Compose(
        [
            RandCropWarpd(["image", "label"], DRAWN, 3.0, crops, "label"),
            RandDrawCTd("image", root / "tissues.json", 3.0, "label"),
            ScaleByModalityd("image", "CT", (-175, 250)),
        ]
    ).set_random_state(0)
    return lambda number: transform(case)


def rate(read: Callable[[int], Any], files: list[Path], crops: int, rounds: int) -> dict[str, float]:
    """Crops a second of processor and of wall time; the files are in the page cache."""
    for number, file in enumerate(files):
        file.read_bytes()
        read(number)
    clocks = {"crops/s a core": time.process_time, "crops/s wall": time.perf_counter}
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(REPEATS):
        before = {name: clock() for name, clock in clocks.items()}
        for number in range(rounds):
            read(number % VOLUMES)
        for name, clock in clocks.items():
            seconds[name].append((clock() - before[name]) / (rounds * crops))
    return {name: round(1 / statistics.median(values)) for name, values in seconds.items()}


def cold_read(read: Callable[[int], Any], files: list[Path], crops: int) -> dict[str, float]:
    """What a read leaves in the page cache of a file that was not in it (mincore), and how long that takes."""
    megabytes, milliseconds = [], []
    for _ in range(3):
        for number, file in enumerate(files):
            forget(file)
            before, start = resident_pages(file), time.perf_counter()
            read(number)
            milliseconds.append((time.perf_counter() - start) * 1e3 / crops)
            megabytes.append((resident_pages(file) - before) * PAGE / 1e6 / crops)
    return {
        "MB read a crop": round(statistics.mean(megabytes), 2),
        "ms a crop, cold": round(statistics.median(milliseconds), 1),
    }


def forget(file: Path) -> None:
    """Takes a file out of the page cache."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_pages(file: Path) -> int:
    """Pages of a file in the page cache; those read ahead count too."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes, libc.mincore.argtypes = (
        [ctypes.c_void_p, ctypes.c_size_t],
        [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_char_p,
        ],
    )
    size = file.stat().st_size
    pages = ctypes.create_string_buffer(-(-size // PAGE))
    with file.open("rb") as stream:
        address = libc.mmap(None, size, 1, 1, stream.fileno(), 0)
        assert libc.mincore(address, size, pages) == 0
        libc.munmap(address, size)
    return sum(flag & 1 for flag in pages.raw)


def resident_megabytes() -> float:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


def many_cases(root: Path, crops: int = 8) -> dict[str, float]:
    """Ten thousand cases, as hard links to a few: start-up, and memory while each is read once."""
    few = read_manifest(root)
    store = root / "many"
    entries = {}
    for number in range(MANY):
        source, file = Path(few[number % VOLUMES]["image"]), volume_file(store, f"v/{number:05d}")
        file.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, file)
        os.link(centres_file(source), centres_file(file))
        settings = {"modality": "CT", "spacing": [1.5] * 3, "intensity_range": [-175, 250], "padding": "x" * 1200}
        entries[f"v/{number:05d}"] = {"id": f"v/{number:05d}", "shape": SHAPE, "centres": 4096, "settings": settings}
    write_manifest(store, entries)
    del entries
    memory, start = resident_megabytes(), time.perf_counter()
    cases = read_manifest(store)
    seconds, listed = time.perf_counter() - start, resident_megabytes()
    read = RandReadCropsd("image", SIZE, crops).set_random_state(0)
    for case in cases[:50]:
        read(case)
    warm = peak = resident_megabytes()
    for case in cases[::4]:
        read(case)
        peak = max(peak, resident_megabytes())
    return {
        "cases": len(cases),
        "start-up, s": round(seconds, 2),
        "memory for the list, MB": round(listed - memory, 1),
        "memory after 50 cases, MB": round(warm, 1),
        "peak over 2,500 cases more, MB": round(peak, 1),
    }


def measure(folder: str | None = None) -> dict[str, Any]:
    """Measure everything on one thread; `folder` takes some 0.6 GB of volumes meanwhile, a temporary one by default."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        cases = make_store(root)
        files = [Path(case["image"]) for case in cases]
        rows: dict[str, dict[str, float]] = {}
        for crops in (8, 1):
            transform = RandReadCropsd("image", SIZE, crops).set_random_state(0)

            def read(number: int, transform: RandReadCropsd = transform) -> Any:
                return transform(cases[number])

            rows[f"store, {crops} crop(s) a volume"] = {
                **rate(read, files, crops, 64 // crops),
                **cold_read(read, files, crops),
            }
        (root / "pt").mkdir()
        read_published = published(root / "pt", 8)
        tensors = [root / "pt" / f"{number}.pt" for number in range(VOLUMES)]
        rows["torch.load and MONAI, 8 a volume"] = {
            **rate(read_published, tensors, 8, 4),
            **cold_read(read_published, tensors, 8),
        }
        rows["CTs drawn of tissue maps, 72^3, 4 a volume"] = rate(drawn(root, 4), tensors, 4, 4)
        many = many_cases(root)
    torch.set_num_threads(threads)
    return {"machine": machine(), "shape": SHAPE, "rows": rows, "many": many}


def markdown(report: dict[str, Any]) -> str:
    """The report as two tables."""
    rows = report["rows"]
    columns = list(next(iter(rows.values())))
    lines = [f"Volumes {SHAPE[1:]}, crops {SIZE}, one thread, medians of {REPEATS}.", ""]
    lines += [f"| | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    lines += [
        f"| {label} | {' | '.join(str(row.get(column, '')) for column in columns)} |" for label, row in rows.items()
    ]
    lines += ["", "| simulated | |", "|---|---|"]
    return "\n".join(lines + [f"| {label} | {value} |" for label, value in report["many"].items()])


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory GB": round(os.sysconf("SC_PHYS_PAGES") * PAGE / 1e9),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "monai": monai.__version__,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="folder for some 0.6 GB of volumes; a temporary one by default")
    parser.add_argument("--json", help="file to write the figures to as well")
    arguments = parser.parse_args()
    report = measure(arguments.out)
    content = json.dumps(report, indent=1)
    print(f"Machine: {report['machine']}. {markdown(report)}", content, sep="\n\n")
    if arguments.json:
        Path(arguments.json).write_text(content)


if __name__ == "__main__":
    main()
