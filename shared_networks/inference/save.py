"""Save label maps with the geometry of their scans."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.colors import to_rgb
from monai.transforms import MapTransform, SaveImaged
from monai.utils import convert_to_dst_type, convert_to_numpy
from scipy import ndimage

from shared_networks.datasets.labels import label_colour
from shared_networks.datasets.nifti import is_nifti, open_nifti
from shared_networks.datasets.organs import name_in_files
from shared_networks.datasets.pairs import source_file
from shared_networks.errors import in_one_line
from shared_networks.figures.overlay import overlay_figure
from shared_networks.figures.planes import shown_channel
from shared_networks.figures.preview import preview_figure
from shared_networks.files import atomic_write, check_tables, is_unwritable, write_csv, write_json
from shared_networks.inference.dicom_seg import OWN_SCHEME, check_highdicom, unknown_labels, write_dicom_seg
from shared_networks.inference.done import Results, read_note
from shared_networks.inference.predict import Scans
from shared_networks.inference.ranks import Ranks
from shared_networks.inference.run_report import run_report, say_looks
from shared_networks.inference.sliding_window import organ_value
from shared_networks.inference.statistics import Row, are_complete, findings, organ_statistics, statistics_table

logger = logging.getLogger(__name__)


def keep_largest_components(labels: np.ndarray) -> np.ndarray:
    """Keep the largest component of each label; the rest becomes background. Voxels with a common corner touch.

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


def label_image(labels: np.ndarray, affine: np.ndarray, file: str, content: str = "labels") -> nib.Nifti1Image:
    """Give labels, or other values, the geometry of the scan's file: affine, units and the codes of sform and qform.

    Args:
        labels: [X, Y, Z] or [X, Y, Z, C], in the type that is written.
        affine: [4, 4] of the scan.
        file: of the scan; of a DICOM series the affine is all there is.
        content: what the values are, for the header.
    """
    if not is_nifti(file):
        image = nib.Nifti1Image(labels, affine)
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = content.encode()
        return image
    source: Any = open_nifti(file)
    header = source.header.copy()
    header.set_data_dtype(labels.dtype)
    header.set_data_shape(labels.shape)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = content.encode()
    header.extensions.clear()
    return nib.Nifti1Image(labels, source.affine, header)


def label_table(label_names: Sequence[str]) -> list[dict[str, Any]]:
    """List value, name and RGB colour (0 to 255), as in figures, of every label but the background."""
    return [
        {"value": value, "name": name, "rgb": [round(255 * part) for part in to_rgb(label_colour(value))]}
        for value, name in enumerate(label_names)
        if value > 0
    ]


class SaveImageLabelsd(Results, SaveImaged):
    """Write labels as `NAME_seg.nii.gz`, what they mean as `NAME_seg.json`, and pictures of them.

    The pictures are `NAME_overlay.png`, slices, and `NAME_preview.png`, surfaces. With an organ's probability,
    `NAME_ORGAN.nii.gz` as well, and with `dicom_seg` the labels as `NAME_seg.dcm`. The sidecar is their record, see
    :class:`shared_networks.inference.done.Results`. At the end of a run, `report.json` has what was done, and
    `statistics.csv` the organs of all cases in the folder, see
    :func:`shared_networks.inference.statistics.organ_statistics`. MONAI Label and MONAI Deploy save by themselves and
    leave it out: the one as it is one of MONAI's savers, the other as its name begins with `SaveImage`.

    Args:
        keys: key of the labels, [1, X, Y, Z] on the scan's grid.
        label_names: names in order of label value, background first.
        output_dir: folder of the results, created if need be.
        window: intensities shown as black and as white; `None` takes percentiles, for MR.
        overlay: whether to draw the pictures.
        organ: name or value of the label whose probability is saved, the `organ_probability` [X, Y, Z] of a case.
        checkpoints: files of the weights.
        settings: all else that results depend on, by name.
        ranks: the processes that share the scans, whose first writes the table; by default this one alone.
        dicom_seg: whether labels are written as DICOM SEG too, of a case's `source`, a DICOM series, with each voxel's
            `label_probability` [X, Y, Z], where the case has it.

    Raises:
        InputError: highdicom is not installed and DICOM SEG is asked for, or a table of someone else would be replaced;
            on call, if a file cannot be written.
    """

    kind = "seg"

    def __init__(
        self,
        keys: str = "pred",
        *,
        label_names: Sequence[str],
        output_dir: str | Path,
        window: Sequence[float] | None = (-175.0, 250.0),
        overlay: bool = True,
        organ: str | int | None = None,
        checkpoints: Sequence[str | Path] = (),
        settings: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
        dicom_seg: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys)
        self.dicom_seg = dicom_seg
        if dicom_seg:
            check_highdicom()
            if unknown := unknown_labels(label_names):
                logger.warning(
                    "dicom_seg: no SNOMED CT code is known of %s; coded as %s by name", ", ".join(unknown), OWN_SCHEME
                )
        self.ranks = ranks or Ranks()
        self.label_names = list(label_names)
        self.output_dir = Path(output_dir)
        if self.kind == "seg":
            check_tables(self.output_dir / "report.json", ("segmented", "look_at"), ["statistics.csv"])
        self.window = window
        self.overlay = overlay
        self.organ = None if organ is None else organ_value(organ, self.label_names)
        self.checkpoints: list[str] = [str(file) for file in checkpoints]
        self.settings = dict(settings or {})
        self.statistics: dict[str, list[Row]] = {}
        self.table = Lock()  # cases are saved in one thread, and in another it is seen which are there

    def targets(self, name: str) -> list[str]:
        """Return the names of all files that may be written of a scan, the labels first, without the sidecar."""
        endings = ["seg.nii.gz"]
        if self.organ is not None:
            organ = name_in_files(self.label_names[self.organ])
            is_labels = re.search("(^|_)seg$", organ, re.IGNORECASE)  # of this scan, or of one that is named so
            endings.append(f"{organ}{'_probability' if is_labels else ''}.nii.gz")
        endings += ["seg.dcm"] if self.dicom_seg else []
        endings += ["overlay.png", "preview.png"] if self.overlay else []
        return [f"{name}_{ending}" for ending in endings]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save one decollated case of :class:`Scans`."""
        name, scan = data["name"], data["scan"]
        labels = convert_to_numpy(data[self.keys[0]][0])
        affine, file = convert_to_numpy(scan.affine), source_file(scan)
        self.claim(name, file)
        written = [f"{name}_seg.nii.gz"]
        with atomic_write(self.output_dir / written[0]) as part:
            nib.save(label_image(labels, affine, file), part)
        if self.organ is not None and (probability := data.get("organ_probability")) is not None:
            image = label_image(labels, affine, file, "probability")
            image.header.set_data_dtype(np.float32)
            chances = probability.numpy()  # float16, which NIfTI has not: converted part by part
            written.append(self.targets(name)[1])
            with atomic_write(self.output_dir / written[-1]) as part:
                nib.save(nib.Nifti1Image(chances, image.affine, image.header, dtype=np.float32), part)
        if self.dicom_seg:
            written += self.write_dicom_seg(name, labels, data)
        if self.overlay:
            written += self.draw(name, convert_to_numpy(scan), labels, affine)
        statistics = organ_statistics(labels, convert_to_numpy(scan[0]), affine, self.label_names)
        content = {
            "scan": file,
            "labels": label_table(self.label_names),
            "files": written,
            "overlay": self.overlay,
            "dicom_seg": self.dicom_seg,
            "statistics": statistics,
            "made_with": self.made_with(data["stamp"]),
        }
        with atomic_write(self.file(name)) as part:
            part.write_text(json.dumps(content, indent=1) + "\n")
        self.list_case(name, statistics)
        return dict(data)

    def write_dicom_seg(self, name: str, labels: np.ndarray, data: Mapping[Hashable, Any]) -> list[str]:
        """Write the labels as a DICOM SEG and return its name; without any organ that is said, and none is written."""
        probability = data.get("label_probability")
        chances = None if probability is None else probability.numpy()
        file = self.output_dir / f"{name}_seg.dcm"
        if write_dicom_seg(file, labels, data["source"], self.label_names, self.checkpoints, chances):
            return [file.name]
        logger.warning("%s: no DICOM SEG, as no organ was found", name)
        return []

    def list_case(self, name: str, statistics: list[Row]) -> None:
        """Add a case to the table of statistics."""
        with self.table:
            self.statistics[name] = statistics

    def finish(self, scans: Scans) -> None:
        """Write the table and the report of all processes, in the first; name the scans to look at.

        Args:
            scans: that were run.
        """
        found, totals = self.ranks.gather("statistics", self.statistics), scans.totals()
        if totals is None:
            return
        cases = {name: rows for part in found for name, rows in part.items()}
        hounsfield = self.settings.get("modality", "CT") == "CT"
        looks = {name: said for name, rows in sorted(cases.items()) if (said := findings(rows))}
        report = run_report(totals, self.checkpoints, self.settings, self.label_names, looks)
        write_json(self.output_dir / "report.json", report)
        write_csv(self.output_dir / "statistics.csv", statistics_table(self.earlier() | cases, hounsfield))
        say_looks(looks, len(cases), self.output_dir / "report.json")

    def earlier(self) -> dict[str, list[Row]]:
        """Return the organs of all label maps in the folder that are of the same labels and modality, by case."""
        found = {}
        for file in self.output_dir.glob(f"*_{self.kind}.json"):
            note, name = read_note(file), file.name.removesuffix(f"_{self.kind}.json")
            made, rows = note.get("made_with"), note.get("statistics")
            same = isinstance(made, dict) and made.get("modality") == self.settings.get("modality")
            same = same and note.get("labels") == label_table(self.label_names)
            if (
                same
                and isinstance(rows, list)
                and are_complete(rows)
                and (self.output_dir / f"{name}_seg.nii.gz").exists()
            ):
                found[name] = rows
        return found

    def draw(self, name: str, image: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> list[str]:
        """Draw the pictures and return their names; what cannot be drawn is said and costs nothing else."""
        drawn, title = [], shown_channel(name, len(image))
        for kind in ("overlay", "preview"):
            file = f"{name}_{kind}.png"
            try:
                if kind == "overlay":
                    figure = overlay_figure(image[0], labels, affine, self.label_names, window=self.window, title=title)
                else:
                    figure = preview_figure(image[0], labels, affine, self.label_names, title=title)
                with atomic_write(self.output_dir / file) as part:
                    figure.savefig(part, bbox_inches="tight")
            except Exception as error:
                if is_unwritable(error):
                    raise
                logger.warning("%s: no picture, as it cannot be drawn (%s)", name, in_one_line(error))
            else:
                drawn.append(file)
        return drawn

    def is_done(self, name: str, stamp: str) -> bool:
        """Return whether results exist of a name, this scan, weights, labels and settings; if so, list its organs."""
        content = read_note(self.file(name))
        if content.get("made_with") != self.made_with(stamp) or content.get("labels") != label_table(self.label_names):
            return False
        if (self.overlay and not content.get("overlay")) or (self.dicom_seg and not content.get("dicom_seg")):
            return False
        if "statistics" not in content or not all((self.output_dir / file).is_file() for file in content["files"]):
            return False
        self.list_case(name, content["statistics"])
        return True
