"""Segment scans with an unpacked release in MONAI Deploy, in an environment with requirements.txt.

    python app.py --model hi_end_mae_btcv_seg --input SCANS --output LABELS

SCANS is a folder with one DICOM series, or a NIfTI file or a folder of such. LABELS gets `NAME_seg.nii.gz` on the grid
of each scan, and of DICOM also a DICOM SEG. The variables HOLOSCAN_MODEL_PATH, HOLOSCAN_INPUT_PATH and
HOLOSCAN_OUTPUT_PATH of MONAI Deploy's containers stand for options that are not given.

The SDK's operators read DICOM, run the bundle and write DICOM SEG. Its reader of NIfTI drops the geometry, and it has
no writer of NIfTI, so both are here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pydicom
from monai.bundle import ConfigParser
from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application, Image, IOType, Operator, OperatorSpec
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_seg_writer_operator import DICOMSegmentationWriterOperator, SegmentDescription
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator
from monai.deploy.operators.dicom_series_to_volume_operator import DICOMSeriesToVolumeOperator
from monai.deploy.operators.dicom_utils import ModelInfo
from monai.deploy.operators.monai_bundle_inference_operator import IOMapping, MonaiBundleInferenceOperator
from pydicom.sr.coding import Code

NEEDED = ("configs/metadata.json", "configs/inference.json", "shared_networks/version.py")
ANATOMY = Code("123037004", "SCT", "Anatomical Structure"), Code("91723000", "SCT", "Anatomical Structure")
"""Category and type of all segments in a DICOM SEG; their labels are the bundle's names."""
COPIED = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyInstanceUID", "StudyID",
    "StudyDate", "StudyTime", "FrameOfReferenceUID",
)  # fmt: skip
"""What a DICOM SEG takes over from the scan."""


class NiftiLoader(Operator):
    """Read NIfTI scans one by one, each checked as the bundle checks it.

    Emits `image`, a scan [X, Y, Z] in the values of its file, with its affine in the metadata that MONAI's transforms
    expect. A scan that is of no use is passed over and noted in `failed`.

    Args:
        fragment: the application.
        sources: of the bundle's `find_scans`.
        modality: as for the bundle's `read_scan`.
        args: conditions of the operator.
        kwargs: of the operator, such as its name.
    """

    def __init__(self, fragment: Application, *args: Any, sources: Sequence[Any], modality: str, **kwargs: Any) -> None:
        self.upcoming = iter(sources)
        self.modality = modality
        self.failed: dict[str, str] = {}
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the output."""
        spec.output("image")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Read the next scan."""
        from shared_networks.datasets.scans import BadScanError, read_scan

        source = next(self.upcoming)
        try:
            scan = read_scan(source, self.modality)
        except BadScanError as error:
            self.failed[source.files[0]] = str(error)
            return
        image = scan.image[0]
        affine = scan.affine.astype(float)
        metadata = {
            "affine": affine,
            "original_affine": affine.copy(),
            "spacing": np.linalg.norm(affine[:3, :3], axis=0),
            "spatial_shape": np.array(image.shape),
            "original_channel_dim": "no_channel",
            "filename_or_obj": source.files[0],
        }
        op_output.emit(Image(image, metadata), "image")


class LabelWriter(Operator):
    """Write labels as NIfTI on the grid of their scan.

    Receives `labels`, [Z, Y, X] with the metadata of the prepared scan, as the SDK's bundle operator emits them.

    Args:
        fragment: the application.
        names: name of the results by file of the scan; of DICOM, by nothing.
        folder: of the results.
        args: conditions of the operator.
        kwargs: of the operator, such as its name.
    """

    def __init__(self, fragment: Application, *args: Any, names: dict[str, str], folder: Path, **kwargs: Any) -> None:
        self.names = names
        self.folder = folder
        self.written: list[str] = []
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the input."""
        spec.input("labels")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Write the labels of one scan."""
        import nibabel as nib

        from shared_networks.files import atomic_write
        from shared_networks.inference.save import label_image

        labels = op_input.receive("labels")
        metadata = labels.metadata()
        file = str(metadata.get("filename_or_obj", ""))
        # The labels lie on the scan's own grid; the metadata's `affine` is that of the prepared scan.
        affine = np.asarray(metadata["original_affine"], dtype=float).reshape(4, 4)
        image = label_image(labels.asnumpy().swapaxes(0, 2), affine, file)
        with atomic_write(self.folder / f"{self.names[file]}_seg.nii.gz") as part:
            nib.save(image, part)
        self.written.append(file)


class Segmentation(Application):
    """Read scans, segment them with a bundle, and write the labels.

    Args:
        app_context: with the folders.
        bundle: an unpacked release.
        sources: the scans, of the bundle's `find_scans`: one DICOM series, or NIfTI.
        names: see :class:`LabelWriter`.
    """

    def __init__(self, app_context: AppContext, bundle: Path, sources: Sequence[Any], names: dict[str, str]) -> None:
        self.app_context = app_context
        self.bundle = bundle
        self.sources = sources
        self.names = names
        self.failed: dict[str, str] = {}
        super().__init__()

    def compose(self) -> None:
        """Connect the operators."""
        metadata, config = (json.loads((self.bundle / NEEDED[index]).read_text()) for index in (0, 1))
        output = Path(self.app_context.output_path)
        infer = MonaiBundleInferenceOperator(
            self,
            app_context=self.app_context,
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
            bundle_path=self.bundle,
            name="infer",
        )
        self.writer = LabelWriter(self, names=self.names, folder=output, name="write")
        self.add_flow(infer, self.writer, {("pred", "labels")})
        if not self.sources[0].series:
            count = CountCondition(self, len(self.sources))
            loader = NiftiLoader(self, count, sources=self.sources, modality=config["modality"], name="load")
            self.failed = loader.failed
            self.add_flow(loader, infer, {("image", "image")})
            return
        folder = Path(self.app_context.input_path)
        load = DICOMDataLoaderOperator(self, CountCondition(self, 1), input_folder=folder, name="load")
        select = DICOMSeriesSelectorOperator(self, rules=rules(self.sources[0].series), name="select")
        volume = DICOMSeriesToVolumeOperator(self, name="volume")
        segments = [
            SegmentDescription(label, *ANATOMY, metadata["name"], metadata["version"])
            for label in list(metadata["network_data_format"]["outputs"]["pred"]["channel_def"].values())[1:]
        ]
        model = ModelInfo(metadata["authors"], metadata["name"], metadata["version"])
        seg = DICOMSegmentationWriterOperator(
            self, segment_descriptions=segments, model_info=model, output_folder=output, name="write_dicom"
        )
        self.add_flow(load, select, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(select, volume, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(volume, infer, {("image", "image")})
        self.add_flow(select, seg, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(infer, seg, {("pred", "seg_image")})


def rules(series: str) -> str:
    """Return the SDK's rule that selects a series by its UID."""
    return json.dumps({"selections": [{"name": "scan", "conditions": {"SeriesInstanceUID": f"^{re.escape(series)}$"}}]})


def check_bundle(bundle: Path) -> None:
    """Refuse what is no unpacked release with weights.

    Raises:
        SystemExit: in one line.
    """
    for file in NEEDED:
        if not (bundle / file).is_file():
            refuse(f"--model {bundle}: no {file} in it; give the folder of an unpacked release")
    if not (bundle / "models" / "model.pt").is_file():
        refuse(f"--model {bundle}: no models/model.pt in it; train it, or make the release with --weights")
    if (bundle / "models" / "model.ts").exists():
        refuse(f"--model {bundle}: MONAI Deploy takes models/model.ts before model.pt, unchecked; move it elsewhere")


def check_series(sources: Sequence[Any], modality: str) -> None:
    """Refuse DICOM that the SDK's operators would take for something else.

    They take the first series alone, one slice a file, and mistake the height of pixels for their width. What a DICOM
    SEG takes over from the scan must be there, be it empty.

    Args:
        sources: of the bundle's `find_scans`, of which one is a series.
        modality: as for the bundle's `read_scan`.

    Raises:
        SystemExit: in one line.
    """
    from shared_networks.datasets.scans import BadScanError, read_scan

    if len(sources) > 1:
        refuse(f"{sources[1].case}: a second scan beside a DICOM series; give --input a folder of one series")
    file = sources[0].files[0]
    with open(file, "rb") as stream:
        if stream.read(132)[128:] != b"DICM":
            refuse(f"{file}: DICOM without a preamble, which MONAI Deploy does not read; convert it to NIfTI")
    header = pydicom.dcmread(file, stop_before_pixels=True)
    if int(header.get("NumberOfFrames") or 1) > 1:
        refuse(f"{file}: holds many slices, where MONAI Deploy reads one a file; convert it to NIfTI")
    if lacking := [tag for tag in COPIED if tag not in header]:
        refuse(f"{file}: has no {', '.join(lacking)}, which DICOM SEG takes over; add them, some may be empty")
    try:
        sizes = np.linalg.norm(read_scan(sources[0], modality).affine[:3, :3], axis=0)
    except BadScanError as error:
        refuse(f"{file}: {error}")
    if not np.isclose(sizes[0], sizes[1], rtol=1e-3):
        refuse(
            f"{file}: pixels of {sizes[0]:.3g} x {sizes[1]:.3g} mm, of which MONAI Deploy swaps the sides; "
            "convert the series to NIfTI"
        )


def segment(context: AppContext, bundle: Path) -> None:
    """Check the weights and find the scans, then run the application.

    Args:
        context: with the folders.
        bundle: an unpacked release, in which the process is.

    Raises:
        InputError: what the bundle's own functions say of weights and scans.
        SystemExit: in one line for what the user can put right, else a line a scan that failed.
    """
    from shared_networks.datasets.scans import find_scans
    from shared_networks.datasets.validate import channel_problem
    from shared_networks.inference.predict import output_names
    from shared_networks.networks.checkpoints import check_weights

    config = ConfigParser()
    config.read_config(bundle / NEEDED[1])
    network = config.get_parsed_content("network_def")
    check_weights(bundle / "models" / "model.pt", network, config.get_parsed_content("preparation"))
    sources = find_scans(context.input_path, "imagesTs")
    taken = config["network_def"]["in_channels"]
    if wrong := next((source for source in sources if source.channels != taken), None):
        refuse(f"{wrong.files[0]}: {channel_problem(wrong.channels, taken, wrong.files)}")
    if any(source.series for source in sources):
        check_series(sources, config["modality"])
    named = output_names(sources)
    names = {"" if source.series else source.files[0]: named[source.case] for source in sources}
    output = Path(context.output_path)
    output.mkdir(parents=True, exist_ok=True)
    app = Segmentation(context, bundle, sources, names)
    app.run()
    lost = {file: "no labels written" for file in names if file not in app.writer.written}
    if failed := {**lost, **app.failed}:
        raise SystemExit("\n".join(f"error: {file}: {reason}" for file, reason in failed.items()))
    print(f"{len(names)} scan(s) segmented to {output}", flush=True)


def refuse(message: str) -> NoReturn:
    """Raise what ends the program with one line.

    Raises:
        SystemExit: always.
    """
    raise SystemExit(f"error: {message}")


def main(arguments: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        SystemExit: in one line for what the user can put right, else a line a scan that failed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "input", "output"):
        parser.add_argument(f"-{name[0]}", f"--{name}", default="")
    parser.error = refuse  # type: ignore[method-assign]
    context = AppContext(vars(parser.parse_args(arguments)))
    # The SDK takes any folder for a TorchScript model that it has loaded; then it would not load the bundle.
    context.models = None
    bundle, scans, output = (Path(p).resolve() for p in (context.model_path, context.input_path, context.output_path))
    context.input_path, context.output_path = str(scans), str(output)
    check_bundle(bundle)
    os.chdir(bundle)  # a bundle's configs name its folder `.`
    sys.path.insert(0, str(bundle))
    from shared_networks.errors import input_error_in

    try:
        segment(context, bundle)
    except Exception as error:
        found = input_error_in(error)
        if found is None:
            raise
        refuse(str(found).replace("--dataset_dir", "--input").replace("dataset_dir", "input"))


if __name__ == "__main__":
    main(sys.argv[1:])
