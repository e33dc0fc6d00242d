"""Train HiEndUNETR, from a Hi-End-MAE encoder or from scratch, by nnU-Net v2.

    export nnUNet_extTrainer=shared_networks/doors/nnunet
    export HI_END_MAE_ENCODER=hi_end_mae_10k.pth
    nnUNetv2_train 1 3d_fullres 0 -tr nnUNetTrainerHiEndMAE

Plans, sampling, augmentation, loss, validation and prediction are nnU-Net's. The optimiser and its schedule are the
bundles' fine-tuning. nnU-Net imports each file of this folder by its bare name, and takes the class of the name asked
for.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from shared_networks.datasets.record import read_record
from shared_networks.doors.nnunet.network import (
    PUBLISHED,
    REORIENTING_READERS,
    SMALL,
    PlannedUNETR,
    axes_of_planes,
    cut_window,
    direction_to_affine,
    mirrored_axes,
    units_of_channels,
)
from shared_networks.errors import InputError, report_in_one_line
from shared_networks.networks.checkpoints import load_encoder
from shared_networks.training.muon import Muon
from shared_networks.training.optim import warmup_cosine

ENCODER = "HI_END_MAE_ENCODER"
"""Variable of the environment that names the encoder's file."""

_SHIPPED = Path(__file__).parents[3] / "hi_end_mae_pretrain" / "weights" / "small.pt"


class nnUNetTrainerHiEndMAE(nnUNetTrainer):  # noqa: N801 (nnU-Net's way of naming)
    """Fine-tune the authors' network from a pre-trained encoder.

    The arguments are nnU-Net's own.
    """

    size = PUBLISHED
    spacing = (1.5, 1.5, 1.5)  # mm, of encoders without a record
    shipped: Path | None = None
    pretrained = True
    learning_rate = 1e-4  # nnU-Net's __init__ sets an `initial_lr` of its own

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.initial_lr, self.weight_decay = self.learning_rate, 1e-5
        self.starts_anew = True

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """Build the network for plans, without weights; nnU-Net's predictor calls this too.

        Args:
            plans_manager: nnU-Net's.
            configuration_manager: nnU-Net's.
            num_input_channels: with those that a cascade adds.
            num_output_channels: classes or regions.
            enable_deep_supervision: without effect.

        Returns:
            A :class:`PlannedUNETR`.

        Raises:
            InputError: the configuration is 2D or a cascade, or its normalisation forgets Hounsfield units.
        """
        if previous := configuration_manager.previous_stage_name:
            raise InputError(
                f"a cascade hands over the labels of {previous} as channels, which the encoder does not know: choose "
                "3d_fullres or 3d_lowres"
            )
        intensities = plans_manager.foreground_intensity_properties_per_channel
        return PlannedUNETR(
            configuration_manager.patch_size,
            axes_of_planes(plans_manager.transpose_backward) if len(configuration_manager.patch_size) == 3 else (),
            units_of_channels(configuration_manager.normalization_schemes, intensities),
            num_output_channels,
            cls.size,
        )

    def initialize(self) -> None:
        """Make network and optimiser, and load the encoder unless a checkpoint of nnU-Net follows.

        Raises:
            InputError: see :meth:`encoder_file`, :meth:`build_network_architecture` and
                :meth:`load_pretrained_encoder`.
        """
        report_in_one_line()
        file = self.encoder_file() if self.starts_anew and self.pretrained else None
        super().initialize()
        if file is not None:
            self.load_pretrained_encoder(file)

    def planned_network(self) -> PlannedUNETR:
        """Return the network without what several processes and `torch.compile` wrap it in."""
        network = self.network
        for wrapper in ("module", "_orig_mod"):
            network = getattr(network, wrapper, network)
        return network

    def on_train_start(self) -> None:
        """Tell the network how the scans lie, after `-pretrained_weights`, which may be of scans that lie otherwise.

        Raises:
            InputError: see :meth:`initialize` and :func:`mirrored_axes`.
        """
        if not self.was_initialized:
            self.initialize()
        network = self.planned_network()
        if self.starts_anew:
            reader = self.plans_manager.image_reader_writer_class.__name__
            network.mirrored = mirrored_axes(() if reader in REORIENTING_READERS else self.affines())
        intensities = self.plans_manager.foreground_intensity_properties_per_channel
        if text := cut_window(self.configuration_manager.normalization_schemes, intensities, network.window):
            self.print_to_log_file(text)
        super().on_train_start()

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Load a checkpoint of nnU-Net, which holds the encoder too."""
        self.starts_anew = False
        super().load_checkpoint(filename_or_checkpoint)

    def encoder_file(self) -> Path:
        """Return the file that the environment names, or the one that ships.

        Raises:
            InputError: none is named, or the file is missing.
        """
        given = os.environ.get(ENCODER)
        file = Path(given) if given else self.shipped
        if file is None or not file.is_file():
            raise InputError(
                f"{ENCODER} is {str(file or '')!r}, which is no file. Set it to the weights that {type(self).__name__} "
                "starts from: a model.pt of hi_end_mae_pretrain or the authors' hi_end_mae_10k.pth; a trainer whose "
                "name ends with Scratch needs none"
            )
        return file

    def load_pretrained_encoder(self, file: Path) -> None:
        """Load an encoder, strictly, and take its window of Hounsfield units.

        Args:
            file: the weights.

        Raises:
            InputError: they are unreadable, of another network, or pre-trained on MR.
        """
        name, network = type(self).__name__, self.planned_network()
        record = read_record(file)
        preparation = record["preparation"] if record is not None else {}
        if preparation.get("modality", "CT") != "CT":
            raise InputError(
                f"{file}: pre-trained on {preparation['modality']}, and {name} feeds Hounsfield units. "
                f"Set {ENCODER} to an encoder of CT"
            )
        try:
            report = load_encoder(network.segmenter, file)
        except InputError as error:
            raise InputError(f"{error} {name} has {self.size}: set {ENCODER} to weights of it") from error
        self.print_to_log_file(report, also_print_to_console=False)
        low, high = preparation.get("intensity_range", network.window)
        network.window = (float(low), float(high))
        spacing = [float(size) for size in preparation.get("spacing", self.spacing)]
        planned = [float(self.configuration_manager.spacing[axis - 2]) for axis in network.axes]
        if not np.allclose(planned, spacing, rtol=0.01):
            z_first = " ".join(f"{size:g}" for size in reversed(spacing))
            self.print_to_log_file(
                f"the plans' voxels are {' x '.join(f'{size:.3g}' for size in planned)} mm, and the encoder was "
                f"pre-trained on {' x '.join(f'{size:g}' for size in spacing)} mm. To have these, plan with "
                f"-overwrite_target_spacing {z_first}"
            )

    def affines(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name of each preprocessed scan and its affine to RAS.

        Raises:
            InputError: the reader knows no orientation.
        """
        folder = Path(self.preprocessed_dataset_folder)
        for name in self.dataset_class.get_identifiers(str(folder)):
            properties = load_pickle(str(folder / f"{name}.pkl"))
            if "nibabel_stuff" in properties:
                yield name, properties["nibabel_stuff"]["original_affine"]
            elif "sitk_stuff" in properties:
                yield name, direction_to_affine(properties["sitk_stuff"]["direction"])
            else:
                reader = self.plans_manager.image_reader_writer_class.__name__
                raise InputError(
                    f"{name}: {reader} does not say how the scan lies in the patient: convert the data set to NIfTI"
                )

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return AdamW, with a warm-up over a tenth of the epochs and then a cosine, as the bundles fine-tune."""
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.initial_lr, weight_decay=self.weight_decay, fused=True
        )
        return optimizer, warmup_cosine(optimizer, range(1), self.num_epochs, self.num_epochs // 10)

    def on_train_epoch_start(self) -> None:
        """Start an epoch: nnU-Net numbers the steps of the schedule, of which PyTorch warns."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            super().on_train_epoch_start()

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing: the network has one output."""


class nnUNetTrainerHiEndMAEScratch(nnUNetTrainerHiEndMAE):  # noqa: N801
    """Train the authors' network from scratch."""

    pretrained = False


class nnUNetTrainerHiEndMAESmall(nnUNetTrainerHiEndMAE):  # noqa: N801
    """Fine-tune the small network, by default from the encoder that ships."""

    size = SMALL
    spacing = (3.0, 3.0, 3.0)
    shipped = _SHIPPED
    learning_rate = 3e-3

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return Muon, with a warm-up over a hundredth of the epochs and then a cosine, as `configs/small.json`."""
        optimizer = Muon(self.network.parameters(), lr=self.initial_lr, weight_decay=self.weight_decay, fused=True)
        return optimizer, warmup_cosine(optimizer, range(1), self.num_epochs, self.num_epochs // 100)


class nnUNetTrainerHiEndMAESmallScratch(nnUNetTrainerHiEndMAESmall):  # noqa: N801
    """Train the small network from scratch."""

    pretrained = False
