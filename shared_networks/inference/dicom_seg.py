"""Write the labels of a DICOM series as a DICOM segmentation object (SEG), which archives and viewers show over it.

Codes are those of SNOMED CT that DICOM PS3.16 lists (CID 7150 and 7151), with laterality as modifier (CID 244).
highdicom, an optional dependency, writes the object: Bridge et al., "Highdicom: a Python library for standardized
encoding of image annotations and machine learning model outputs in pathology and radiology", J Digit Imaging 2022.
"""

from __future__ import annotations

import hashlib
import importlib.util
import unicodedata
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_networks.datasets.dicom import Slice, series_grid, series_slices
from shared_networks.datasets.labels import label_colour
from shared_networks.datasets.organs import canonical_name
from shared_networks.datasets.record import file_digest
from shared_networks.datasets.scans import Scan, Source
from shared_networks.errors import InputError, in_one_line
from shared_networks.files import atomic_write
from shared_networks.version import __version__

MAKER = "Hi-End-MAE bundles"
OWN_SCHEME = "99HIENDMAE"
"""Designator of the codes of labels that have none in SNOMED CT."""

_LONGEST_TEXT = 64  # characters of DICOM's LO
_COPIED_UNREAD = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime")  # highdicom refuses odd ones
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
_MAY_BE_EMPTY = (
    *_COPIED_UNREAD,
    *("PatientID", "PatientName", "AccessionNumber", "StudyID", "ReferringPhysicianName"),
)


class Concept(NamedTuple):
    """A coded concept: value, meaning and scheme."""

    value: str
    meaning: str
    scheme: str = "SCT"


class Property(NamedTuple):
    """What a segment is: its type, and what narrows it."""

    kind: Concept
    modifiers: tuple[Concept, ...] = ()


ANATOMICAL_STRUCTURE = Concept("123037004", "Anatomical Structure")
SIDES = {"left": Concept("7771000", "Left"), "right": Concept("24028007", "Right")}
SIDED = {"kidney": Concept("64033007", "Kidney"), "adrenal gland": Concept("23451007", "Adrenal gland")}
ORGANS = {
    "spleen": Property(Concept("78961009", "Spleen")),
    "gallbladder": Property(Concept("28231008", "Gallbladder")),
    "esophagus": Property(Concept("32849002", "Esophagus")),
    "liver": Property(Concept("10200004", "Liver")),
    "stomach": Property(Concept("69695003", "Stomach")),
    "aorta": Property(Concept("15825003", "Aorta")),
    "inferior vena cava": Property(Concept("64131007", "Inferior vena cava")),
    "portal vein": Property(Concept("32764006", "Portal vein")),
    "splenic vein": Property(Concept("35819009", "Splenic vein")),
    # No code is of both veins, and a segment has one type.
    "portal vein and splenic vein": Property(
        Concept("32764006", "Portal vein"), (Concept("35819009", "Splenic vein"),)
    ),
    "pancreas": Property(Concept("15776009", "Pancreas")),
    "duodenum": Property(Concept("38848004", "Duodenum")),
}
ORGANS |= {name: Property(kind) for name, kind in SIDED.items()}
ORGANS |= {f"{side} {name}": Property(kind, (SIDES[side],)) for name, kind in SIDED.items() for side in SIDES}


def coded_label(name: str) -> Property:
    """Return the code of a label's name; its spelling does not matter, see :func:`canonical_name`.

    A name that is not known has a code of this package's own scheme, the same wherever the name is.
    """
    found = ORGANS.get(canonical_name(name))
    if found is not None:
        return found
    digest = hashlib.sha256(name.encode()).hexdigest()[:12].upper()
    return Property(Concept(digest, _short(name), OWN_SCHEME))


def unknown_labels(label_names: Sequence[str]) -> list[str]:
    """Return the names, but the background's, that have no code in SNOMED CT."""
    return [name for name in label_names[1:] if coded_label(name).kind.scheme == OWN_SCHEME]


def check_highdicom() -> None:
    """Refuse to go on without highdicom.

    Raises:
        InputError: it is not installed, or too old.
    """
    if importlib.util.find_spec("highdicom") is None:
        found = "which is not installed"
    elif tuple(map(int, (installed := version("highdicom")).split(".")[:2])) < (0, 28):
        found = f"and {installed} is installed"
    else:
        return
    raise InputError(
        f"dicom_seg: DICOM SEG is written with highdicom 0.28 or later, {found}; "
        "pip install 'hi-end-mae-bundles[dicom-seg]' or 'highdicom>=0.28'"
    )


def check_source(source: Source, scan: Scan) -> dict[str, Any]:
    """Refuse a scan that no DICOM SEG can refer to, before the network sees it.

    Args:
        source: of the scan.
        scan: what was read of it.

    Returns:
        Nothing more for its item.

    Raises:
        InputError: it is NIfTI, or its headers lack what a reference needs.
    """
    if not source.series:
        raise InputError(
            "NIfTI, and a DICOM SEG can only refer to a DICOM series; leave out --dicom_seg, or give the series"
        )
    read_instances(source, scan.image.shape[1:])
    return {}


def read_instances(source: Source, shape: Sequence[int]) -> tuple[list[Any], NDArray[np.intp]]:
    """Read the headers of a series, which a DICOM SEG refers to.

    Small differences that the reader of scans forgives are smoothed out in memory: orientation, pixel size.

    Args:
        source: a DICOM series.
        shape: (X, Y, Z) of its labels.

    Returns:
        Headers by position, or one of a multi-frame file; and for each of their frames its slice in the labels.

    Raises:
        InputError: labels of this shape are not on the series' slices, or headers lack what a reference needs.
    """
    slices = series_slices(source.files)
    grid, _ = series_grid(slices)
    if tuple(grid) != tuple(shape):
        raise InputError(
            f"no DICOM SEG: labels of {_size(shape)} voxels do not lie on the series' slices, {_size(grid)}; "
            "leave out --dicom_seg"
        )
    gap = float((slices[-1].origin - slices[0].origin) @ slices[0].axes[:, 2]) / (len(slices) - 1)
    if slices[0].frames > 1:
        if len(files := {part.file for part in slices}) > 1:
            raise InputError(f"no DICOM SEG can refer to {len(files)} multi-frame files at once; leave out --dicom_seg")
        images = [_header(slices[0])]
        _share_geometry(images[0], slices[0], gap)
        return images, np.argsort([part.frame for part in slices])
    images = [_header(part) for part in slices]
    if len({image.SOPInstanceUID for image in images}) < len(images):
        raise InputError("no DICOM SEG: several slices have one SOPInstanceUID; export the series again")
    for image in images:
        image.ImageOrientationPatient = images[0].ImageOrientationPatient
        image.PixelSpacing = images[0].PixelSpacing
        image.SpacingBetweenSlices = _decimal(gap)
        image.SliceThickness = image.get("SliceThickness") or _decimal(gap)
    return images, np.arange(len(images))


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _decimal(value: float) -> Any:
    from pydicom.valuerep import DSfloat

    return DSfloat(value, auto_format=True)


def _header(part: Slice) -> Any:
    """The header of a file, with all that highdicom copies."""
    from pydicom import dcmread

    header = dcmread(part.file, stop_before_pixels=True, force=True)  # old files have no preamble
    if lacking := [name for name in _NEEDED if not header.get(name)]:
        raise InputError(f"no DICOM SEG: {Path(part.file).name} has no {' and '.join(lacking)}; export it again")
    for name in _MAY_BE_EMPTY:
        if name not in header:
            setattr(header, name, "")
    return header


def _share_geometry(header: Any, first: Slice, gap: float) -> None:
    """Note orientation and pixel size for all frames at once, as files may have them frame by frame."""
    from pydicom.dataset import Dataset

    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    orientation, measures = Dataset(), Dataset()
    orientation.ImageOrientationPatient = [_decimal(value) for value in first.axes[:, :2].T.ravel()]
    measures.PixelSpacing = [_decimal(first.spacing[1]), _decimal(first.spacing[0])]
    measures.SliceThickness = measures.SpacingBetweenSlices = _decimal(gap)
    for part in (shared, *header.PerFrameFunctionalGroupsSequence):
        thickness = (part.get("PixelMeasuresSequence") or [{}])[0].get("SliceThickness")
        measures.SliceThickness = thickness or measures.SliceThickness
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    header.SharedFunctionalGroupsSequence = [shared]


def mean_probabilities(labels: NDArray[Any], probability: NDArray[Any], classes: int) -> NDArray[np.float64]:
    """Average over the voxels of each label the probability that they have of it.

    Args:
        labels: [X, Y, Z] integers.
        probability: [X, Y, Z] of each voxel's label.
        classes: background included.

    Returns:
        [classes]; NaN of labels without voxels.
    """
    sums, counts = np.zeros(classes), np.zeros(classes)
    for plane, chances in zip(labels, probability, strict=True):  # in float64 a whole scan would fill the memory
        sums += np.bincount(plane.ravel(), chances.ravel(), classes)
        counts += np.bincount(plane.ravel(), minlength=classes)
    return np.divide(sums, counts, out=np.full(classes, np.nan), where=counts > 0)


def write_dicom_seg(
    file: str | Path,
    labels: NDArray[Any],
    source: Source,
    label_names: Sequence[str],
    checkpoints: Sequence[str | Path] = (),
    probability: NDArray[Any] | None = None,
) -> bool:
    """Write the labels of a series as a DICOM SEG of the type BINARY, a segment for each label that occurs.

    Each frame has the position of a slice of the series and refers to it. Segments are numbered from 1 without gaps, as
    DICOM wants it; the label's value and its mean probability are in a segment's description.

    Args:
        file: to write.
        labels: [X, Y, Z] integers on the scan's own grid.
        source: the series.
        label_names: in order of label value, background first.
        checkpoints: files of the weights, whose digests identify the algorithm.
        probability: [X, Y, Z] of each voxel's label, if known.

    Returns:
        Whether it was written: of labels without any organ none is.

    Raises:
        InputError: the series is none that an object can refer to, or the file cannot be written.
    """
    values = [value for value in np.unique(labels).tolist() if value > 0]
    if not values:
        return False
    import highdicom  # only here: an optional dependency

    images, order = read_instances(source, labels.shape)
    numbers = np.zeros(len(label_names), np.uint8 if len(values) < 256 else np.uint16)
    numbers[values] = range(1, len(values) + 1)
    means = None if probability is None else mean_probabilities(labels, probability, len(label_names))
    segments = [
        _segment(number, value, label_names[value], checkpoints, None if means is None else float(means[value]))
        for number, value in enumerate(values, start=1)
    ]
    unread = [images[0].pop(name) for name in _COPIED_UNREAD]
    for name in _COPIED_UNREAD:
        setattr(images[0], name, "")
    try:
        content = highdicom.seg.Segmentation(
            source_images=images,
            pixel_array=numbers[labels.transpose(2, 1, 0)[order]],
            segmentation_type="BINARY",
            segment_descriptions=segments,
            series_instance_uid=highdicom.UID(),
            series_number=1000 + abs(int(images[0].get("SeriesNumber") or 0)) % 1_000_000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name="Hi-End-MAE",
            software_versions=__version__,
            device_serial_number="0",
            content_description="organs",
            content_label="SEGMENTATION",
            specific_character_set="ISO_IR 192",
            series_description="Organs, segmented by Hi-End-MAE",
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"no DICOM SEG can be made of its headers ({in_one_line(error)}); export the series again or leave out "
            "--dicom_seg"
        ) from error
    for element in unread:
        content.add(element)
    with atomic_write(file) as part:
        content.save_as(part)
    return True


def _segment(
    number: int, value: int, name: str, checkpoints: Sequence[str | Path], mean_probability: float | None
) -> Any:
    """The description of a segment."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    kind, modifiers = coded_label(name)
    segment = SegmentDescription(
        number,
        _short(name),
        CodedConcept(ANATOMICAL_STRUCTURE.value, ANATOMICAL_STRUCTURE.scheme, ANATOMICAL_STRUCTURE.meaning),
        CodedConcept(kind.value, kind.scheme, kind.meaning),
        "AUTOMATIC",
        AlgorithmIdentificationSequence(
            "Hi-End-MAE",
            codes.DCM.ArtificialIntelligence,
            __version__,
            MAKER,
            {f"weights {Path(weights).name} sha256": file_digest(weights) for weights in checkpoints} or None,
        ),
        display_color=CIELabColor.from_string(label_colour(value)),
    )
    if modifiers:
        concepts = [CodedConcept(modifier.value, modifier.scheme, modifier.meaning) for modifier in modifiers]
        segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = concepts
    mean = [] if mean_probability is None else [f"mean probability {mean_probability:.2f}"]
    segment.SegmentDescription = ", ".join([f"label value {value}", *mean])
    return segment


def _short(name: str) -> str:
    """A name as DICOM takes it: without control characters and backslash, which parts values, and not too long."""
    plain = "".join("/" if c == "\\" else " " if unicodedata.category(c) == "Cc" else c for c in name)
    return plain.strip()[:_LONGEST_TEXT]
