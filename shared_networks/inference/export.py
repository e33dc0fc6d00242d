"""Segmenting a folder of scans: each is read, checked and prepared when its turn comes, and its labels are saved whole.

What is wrong with a scan costs that scan alone; it is listed at the end.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from matplotlib.colors import to_rgb
from monai.data import MetaTensor, list_data_collate
from monai.transforms import Compose, LoadImaged, MapTransform, SaveImaged
from monai.utils import ImageMetaKey, MetaKeys, SpaceKeys, convert_to_dst_type, convert_to_numpy
from scipy import ndimage
from torch.utils.data import IterableDataset
from tqdm import tqdm

from shared_networks.data.checks import channel_problem, open_nifti
from shared_networks.data.datalist import Image, case_name, is_nifti
from shared_networks.data.free_memory import free_memory
from shared_networks.data.sources import (
    BadScanError,
    Scan,
    Source,
    Sources,
    file_source,
    find_sources,
    read_grid,
    read_scan,
)
from shared_networks.errors import InputError, input_error_in
from shared_networks.figures import label_colour, overlay_figure
from shared_networks.inference.sliding_window import SlidingWindowLabels, scan_grid
from shared_networks.record import file_digest
from shared_networks.reports import source_file, written_whole

_TORCH_TYPES = ("int8", "uint8", "int16", "int32", "float32")
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG)

logger = logging.getLogger(__name__)


def find_scans(dataset_dir: str | Path | None, images_glob: str | None = None) -> Sources:
    """Finds the scans to segment.

    Args:
        dataset_dir: a NIfTI file; an nnU-Net data set, of which `imagesTs` is read, or `imagesTr` where there is none
            or nothing in it; or a folder with NIfTI files and DICOM series at any depth (see
            :mod:`shared_networks.data.sources`).
        images_glob: of the folder read the NIfTI files that this pattern finds, and nothing else.

    Raises:
        InputError: there is no scan, or DICOM without SimpleITK.
    """
    root = Path(dataset_dir or "")
    if images_glob:
        return find_sources(dataset_dir, images_glob)
    if dataset_dir and root.is_file() and is_nifti(root.name):
        return Sources([Source(case_name(root.name), (str(root.resolve()),))])
    tested = root / "imagesTs"
    has_tested = bool(dataset_dir) and tested.is_dir() and any(tested.iterdir())
    return find_sources(tested if has_tested else dataset_dir)


def output_names(sources: Sequence[Source]) -> dict[str, str]:
    """Names for the results by case, no two alike, also where small and capital letters are the same.

    A name is the last part of the case's id; all parts where several cases share that, or where the results would be
    named as another scan; and with a digest of the id where these are the same too.
    """
    cases = [source.case for source in sources]
    forms = [
        {case: case.rpartition("/")[2] for case in cases},
        {case: case.replace("/", "_") for case in cases},
        {case: f"{case.replace('/', '_')}_{hashlib.sha256(case.encode()).hexdigest()[:8]}" for case in cases},
    ]
    counts = [Counter(name.casefold() for name in form.values()) for form in forms]
    scans = {case_name(file).casefold() for source in sources for file in source.files}
    names = {}
    for case in cases:
        for form, count in zip(forms, counts, strict=True):
            name = form[case].casefold()
            if count[name] == 1 and not any(f"{name}_{result}" in scans for result in ("seg", "uncertainty")):
                break
        names[case] = form[case]
    return names


def scan_stamp(source: Source) -> str:
    """What tells whether a scan has changed: its files' number, size and time of last change."""
    stats = [os.stat(file) for file in source.files]
    size, time = sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)
    return f"{source.files[0]}: {len(stats)} file(s), {size} bytes, changed {time}"


def memory_estimate(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float], classes: int) -> int:
    """Bytes that segmenting a scan takes at most, without the network, from tests/benchmarks/inference.py.

    Args:
        shape: (X, Y, Z) of the scan.
        spacing: its voxel size in mm.
        target: voxel size in mm that it is prepared to.
        classes: background included.
    """
    prepared = [n * old / new for n, old, new in zip(shape, spacing, target, strict=True)]
    slab = math.prod(prepared) / max(*prepared, 1) * min(max(prepared), 96)
    return int(math.prod(shape) * 6 + math.prod(prepared) * 16 + slab * 4 * (classes + 1) + 6e8)


def scan_tensor(scan: Scan, file: str) -> MetaTensor:
    """A scan as `LoadImaged` and `EnsureChannelFirstd` would have it, [C, X, Y, Z], but in its own number type."""
    image = scan.image.astype(scan.image.dtype.newbyteorder("="), copy=False)
    image = image if image.dtype.name in _TORCH_TYPES else image.astype(np.float32)
    affine = torch.as_tensor(scan.affine, dtype=torch.float64)
    meta = {
        MetaKeys.ORIGINAL_AFFINE: scan.affine.astype(float),
        MetaKeys.SPATIAL_SHAPE: np.array(image.shape[1:]),
        MetaKeys.SPACE: SpaceKeys.RAS,
        MetaKeys.ORIGINAL_CHANNEL_DIM: 0,
        ImageMetaKey.FILENAME_OR_OBJ: file,
    }
    return MetaTensor(torch.from_numpy(image), affine=affine, meta=meta)


def one_case(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Makes a batch of a single case, as `monai.data.list_data_collate` does, but without copying its volumes."""
    (item,) = items
    tensors = {name: value for name, value in item.items() if isinstance(value, MetaTensor)}
    # Only metadata are collated; what they belong to does not matter.
    batch = list_data_collate(
        [{**item, **{n: MetaTensor(torch.zeros(1)).copy_meta_from(t) for n, t in tensors.items()}}]
    )
    for name, tensor in tensors.items():
        batch[name] = MetaTensor(tensor.as_tensor()[None]).copy_meta_from(batch[name])
        batch[name].is_batch = True
    return batch


class Scans(IterableDataset):
    """The scans of a folder, prepared one by one; what cannot be segmented is passed over and noted.

    Each item has `image`, prepared; `scan`, [C, X, Y, Z] as on file; `name`, of the results; and `stamp`.

    Args:
        data: of :func:`find_scans`, or NIfTI files.
        transform: the preprocessing. A `LoadImaged` at its start is passed over: scans are read, checked to the last
            voxel and held in their own number type by :func:`shared_networks.data.sources.read_scan`.
        spacing: voxel size in mm that it prepares, for estimates of memory.
        classes: number of labels, background included, for the same.
        skip: whether results of a name and stamp are there already.
        modality: `CT`, whose values must be Hounsfield units, or `MR`; `None` accepts either.
        in_channels: files that the network takes of each scan.
    """

    def __init__(
        self,
        data: Sequence[Source | Image],
        transform: Compose,
        spacing: Sequence[float],
        classes: int,
        skip: Callable[[str, str], bool] | None = None,
        modality: str | None = "CT",
        in_channels: int | None = None,
    ) -> None:
        self.passed_over: dict[str, str] = getattr(data, "passed_over", {})
        self.data = [scan if isinstance(scan, Source) else file_source(scan) for scan in data]
        self.transform = transform
        self.spacing = spacing
        self.classes = classes
        self.skip = skip
        self.modality = modality
        self.in_channels = in_channels
        self.start()

    def start(self) -> None:
        """Begin with the first scan again."""
        self.failed: dict[str, str] = {}
        self.skipped: list[str] = []
        self.done: list[str] = []
        self.next = 0
        self.current: Source | None = None

    def run(self, evaluator: Any) -> None:
        """Have all scans segmented; one that fails, wherever that is, costs itself alone.

        Args:
            evaluator: MONAI evaluator over a loader of these scans.

        Raises:
            InputError: results cannot be written.
        """
        self.start()
        while self.next < len(self.data):
            at = self.next
            try:
                evaluator.run()
                if self.next == at:
                    evaluator.run()  # ignite's engine first ends the run that failed
            except Exception as error:
                if self.current is None or is_unwritable(error):
                    raise
                self.failed[self.current.files[0]] = reason_of(error)
                self.current = None
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()  # the next scan may fit
            if self.next == at:
                raise RuntimeError(f"the evaluator asks for no scan after {at} of {len(self.data)}")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield what is left to be segmented, in order, with a progress bar over all cases."""
        if self.next >= len(self.data):
            self.start()
        names = output_names(self.data)
        bar = tqdm(self.data, "segmenting", unit="case", disable=None, initial=self.next)
        while self.next < len(self.data):
            source = self.data[self.next]
            self.next += 1
            bar.update()
            try:
                stamp = scan_stamp(source)
                if self.skip is not None and self.skip(names[source.case], stamp):
                    self.skipped.append(source.case)
                    continue
                item = {**self.prepare(source), "name": names[source.case], "stamp": stamp}
            except (BadScanError, InputError) as error:
                self.failed[source.files[0]] = str(error)
                continue
            except FileNotFoundError as error:
                self.failed[source.files[0]] = f"no such file, or a broken link: {error.filename}"
                continue
            except Exception as error:  # one odd scan must not end the run
                self.failed[source.files[0]] = reason_of(error)
                continue
            self.current = source
            yield item
            self.current = None
            self.done.append(source.case)

    def prepare(self, source: Source) -> dict[str, Any]:
        """Read, check and prepare a scan.

        Raises:
            BadScanError: it is of no use, or too large for the memory.
            InputError: its axes are not at right angles.
        """
        channels = 1 if source.series else len(source.files)
        if not source.problem and self.in_channels is not None and channels != self.in_channels:
            raise BadScanError(channel_problem(channels, self.in_channels))
        if (grid := read_grid(source)) is not None and (free := free_memory()) is not None:
            needed = memory_estimate(*grid, self.spacing, self.classes)
            size = " x ".join(map(str, grid[0]))
            if needed > free:
                raise BadScanError(
                    f"{size} voxels need about {needed / 1e9:.1f} GB beside the network, {free / 1e9:.1f} GB are free; "
                    "close other programs, or crop the scan"
                )
            if needed > 0.5 * free:
                logger.warning("%s: %s voxels, about %.1f GB beside the network", source.case, size, needed / 1e9)
        scan = scan_tensor(read_scan(source, self.modality), source.files[0])
        start = 1 if isinstance(self.transform.transforms[0], LoadImaged) else 0
        item: Any = self.transform({"image": MetaTensor(scan), "scan": scan}, start=start)
        if not min(item["image"].shape) or not (item["image"] > 0).any():
            raise BadScanError("no voxel is above the floor of the intensity window; is it a CT in HU, or an MR?")
        scan_grid(item["image"][None])
        return item

    def report(self) -> None:
        """Say what was done.

        Raises:
            InputError: a line for each scan that could not be segmented.
        """
        for path, reason in self.passed_over.items():
            logger.warning("%s: passed over: %s", path, reason)
        print(
            f"{len(self.done)} segmented, {len(self.skipped)} there already, {len(self.failed)} failed, "
            f"{len(self.passed_over)} passed over",
            flush=True,
        )
        if self.failed:
            lines = [f"{file}: {reason}" for file, reason in self.failed.items()]
            raise InputError("\n".join([f"{len(lines)} of {len(self.data)} scan(s) not segmented:", *lines]))


def keep_largest_components(labels: np.ndarray) -> np.ndarray:
    """Of every label keep the largest piece, voxels with a common corner being one piece; the rest becomes background.

    MONAI's `KeepLargestConnectedComponent` needs scikit-image and a pass over the whole volume for each label.

    Args:
        labels: [X, Y, Z] integers, 0 the background.
    """
    kept = labels.copy()
    touching = ndimage.generate_binary_structure(3, 3)
    for value, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        organ = labels[box] == value
        pieces, count = ndimage.label(organ, touching)
        if count > 1:
            largest = np.bincount(pieces[organ]).argmax()
            kept[box][organ & (pieces != largest)] = 0
    return kept


class KeepLargestComponentsd(MapTransform):
    """:func:`keep_largest_components` of label maps [1, X, Y, Z]."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Clean one decollated case."""
        out = dict(data)
        for key in self.key_iterator(out):
            kept = keep_largest_components(convert_to_numpy(out[key][0]))
            out[key] = convert_to_dst_type(kept[None], out[key])[0]
        return out


def label_image(labels: np.ndarray, affine: np.ndarray, file: str) -> nib.Nifti1Image:
    """Labels with the geometry of the scan's file: affine, units and the codes of sform and qform.

    Args:
        labels: [X, Y, Z], in the type that is written.
        affine: [4, 4] of the scan.
        file: of the scan; of a DICOM series the affine is all there is.
    """
    if not is_nifti(file):
        image = nib.Nifti1Image(labels, affine)
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
        image.header.set_xyzt_units("mm")
        return image
    source: Any = open_nifti(file)
    header = source.header.copy()
    header.set_data_dtype(labels.dtype)
    header.set_data_shape(labels.shape)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b"labels"
    header.extensions.clear()
    return nib.Nifti1Image(labels, source.affine, header)


def label_table(label_names: Sequence[str]) -> list[dict[str, Any]]:
    """Value, name and RGB colour (0 to 255), the figures' colours, of every label but the background."""
    return [
        {"value": value, "name": name, "rgb": [round(255 * part) for part in to_rgb(label_colour(value))]}
        for value, name in enumerate(label_names)
        if value > 0
    ]


class SaveSegmentationd(SaveImaged):
    """Writes labels as `NAME_seg.nii.gz`, what they mean as `NAME_seg.json`, and a look at them as `NAME_overlay.png`.

    With an organ's probability, `NAME_ORGAN.nii.gz` as well. The sidecar is written last: with it, a case is complete.
    It is one of MONAI's savers so that MONAI Label, which saves by itself, leaves it out.

    Args:
        keys: key of the labels, [1, X, Y, Z] on the scan's grid.
        label_names: names in order of label value, background first.
        output_dir: folder of the results, created if need be.
        window: intensities shown as black and as white; `None` takes percentiles, for MR.
        overlay: whether to draw the figure.
        inferer: with the `organ_probability` of the last scan.
        checkpoints: files of the weights.
        settings: all else that results depend on, by name.

    Raises:
        InputError: on call, if a file cannot be written.
    """

    def __init__(
        self,
        keys: str = "pred",
        *,
        label_names: Sequence[str],
        output_dir: str | Path,
        window: Sequence[float] | None = (-175.0, 250.0),
        overlay: bool = True,
        inferer: SlidingWindowLabels | None = None,
        checkpoints: Sequence[str | Path] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        MapTransform.__init__(self, keys)
        self.label_names = list(label_names)
        self.output_dir = Path(output_dir)
        self.window = window
        self.overlay = overlay
        self.inferer = inferer
        self.checkpoints = [str(file) for file in checkpoints]
        self.settings = dict(settings or {})

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save one decollated case of :class:`Scans`."""
        name, scan = data["name"], data["scan"]
        labels = convert_to_numpy(data[self.keys[0]][0])
        affine, file = convert_to_numpy(scan.affine), source_file(scan)
        written = [f"{name}_seg.nii.gz"]
        with written_whole(self.output_dir / written[0]) as part:
            nib.save(label_image(labels, affine, file), part)
        if self.inferer is not None and self.inferer.organ is not None and self.inferer.organ_probability is not None:
            organ = self.label_names[self.inferer.organ].replace(" ", "_")
            image = label_image(labels, affine, file)
            image.header.set_data_dtype(np.float32)
            chances = self.inferer.organ_probability.numpy()
            written.append(f"{name}_{organ}.nii.gz")
            with written_whole(self.output_dir / written[-1]) as part:
                nib.save(nib.Nifti1Image(chances, image.affine, image.header, dtype=np.float32), part)
        if self.overlay:
            written += self.draw(name, convert_to_numpy(scan[0]), labels, affine)
        content = {
            "scan": file,
            "labels": label_table(self.label_names),
            "files": written,
            "overlay": self.overlay,
            "made_with": self.made_with(data["stamp"]),
        }
        with written_whole(self.output_dir / f"{name}_seg.json") as part:
            part.write_text(json.dumps(content, indent=1) + "\n")
        return dict(data)

    def draw(self, name: str, image: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> list[str]:
        """Write the figure and return its name; a figure that cannot be drawn is said and costs nothing else."""
        try:
            figure = overlay_figure(image, labels, affine, self.label_names, window=self.window, title=name)
            with written_whole(self.output_dir / f"{name}_overlay.png") as part:
                figure.savefig(part, bbox_inches="tight")
        except Exception as error:
            if is_unwritable(error):
                raise
            logger.warning("%s: no picture, as it cannot be drawn (%s)", name, reason_of(error))
            return []
        return [f"{name}_overlay.png"]

    def made_with(self, stamp: str) -> dict[str, Any]:
        """What results depend on: the scan, the weights and the settings."""
        weights = [f"{file}: {file_digest(file)}" for file in self.checkpoints]
        return json.loads(json.dumps({"scan": stamp, "weights": weights, **self.settings}, default=str))

    def is_done(self, name: str, stamp: str) -> bool:
        """Whether the results of a name are there and of this scan, these weights and these settings."""
        try:
            content = json.loads((self.output_dir / f"{name}_seg.json").read_text())
        except (OSError, ValueError):
            return False
        if content.get("made_with") != self.made_with(stamp) or (self.overlay and not content.get("overlay")):
            return False
        return all((self.output_dir / file).is_file() for file in content["files"])


def reason_of(error: BaseException) -> str:
    """Return why a scan failed, in one line; what is unforeseen goes into the log with its traceback."""
    found = input_error_in(error)
    if found is not None:
        return str(found)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "not enough memory for it; close other programs, or crop the scan"
    if not isinstance(error, OSError | RuntimeError | ValueError):
        logger.warning("unforeseen error", exc_info=error)
    return f"failed ({' '.join(f'{type(error).__name__}: {error}'.split())}); export it again or remove the case"


def is_unwritable(error: BaseException) -> bool:
    """Return whether an error is that results cannot be written, as none of the scans after it could."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _UNWRITABLE:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def load_engine(file: str | Path, device: torch.device | str, **sizes: Any) -> torch.nn.Module:
    """Loads a network that `trt_export` has compiled with TensorRT.

    Args:
        file: which `trt_export` wrote.
        device: to run it on.
        sizes: of the network, which overlays such as `tiny.json` set; the engine has its own.

    Raises:
        InputError: there is no such file, it does not load on this machine, or torch_tensorrt is not installed.
    """
    remedy = (
        f"Make it with: python -m monai.bundle trt_export network_def --filepath {file} --ckpt_file models/model.pt "
        "--meta_file configs/metadata.json --config_file configs/inference.json --precision fp16"
    )
    if not Path(file).is_file():
        raise InputError(f"{file}: no TensorRT engine there. {remedy}")
    try:
        importlib.import_module("torch_tensorrt")  # torch then knows what an engine is
        return torch.jit.load(file, map_location=device)
    except ImportError as error:
        raise InputError(f"{file}: runs with torch_tensorrt ({error}); pip install torch-tensorrt") from error
    except RuntimeError as error:
        raise InputError(f"{file}: does not load on this machine ({str(error).splitlines()[0]}). {remedy}") from error
