"""Give HiEndUNETR to nnU-Net: its arrays in, logits of their size out.

nnU-Net v2 keeps its plans, and with them its own order of axes, its normalisation and its patch. The network undoes
them, so that the encoder gets what it was pre-trained on: [X, Y, Z] towards right, front and head (RAS), the window of
Hounsfield units as 0 to 1, and sizes that its patches divide. nnU-Net itself is not needed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_networks.errors import InputError
from shared_networks.networks.unetr import HiEndUNETR

WINDOW = (-175.0, 250.0)
"""HU that become 0 and 1, as the bundles have them."""

PUBLISHED: dict[str, Any] = {"patch_size": 12}
"""Arguments of the authors' HiEndUNETR: its defaults."""

SMALL: dict[str, Any] = {
    "patch_size": 6,
    "feature_size": 16,
    "hidden_size": 192,
    "num_heads": 6,
    "num_upsamples": 2,
}
"""Arguments of the network of `configs/small.json`, of which weights ship."""

REORIENTING_READERS = ("NibabelIOWithReorient", "SimpleITKIOWithReorient")
"""Readers of nnU-Net that turn every scan to RAS."""

_READER_ADVICE = (
    'write "overwrite_image_reader_writer": "NibabelIOWithReorient" into dataset.json, then plan and preprocess again'
)


def axes_of_planes(transpose_backward: Sequence[int]) -> tuple[int, int, int]:
    """Return where nnU-Net's arrays have X, Y and Z.

    Args:
        transpose_backward: of the plans, which leads back to the reader's [Z, Y, X].

    Returns:
        The spatial axes (0 to 2) that are X, Y and Z.
    """
    z, y, x = transpose_backward
    return x, y, z


def units_of_channels(
    schemes: Sequence[str], intensities: Mapping[str, Mapping[str, float]]
) -> list[tuple[float, float]]:
    """Return how Hounsfield units follow from what nnU-Net's normalisation made of them.

    Args:
        schemes: names of the plans' normalisations, one a channel.
        intensities: the plans' foreground intensities by channel.

    Returns:
        For each channel factor and offset: HU are `factor * value + offset`.

    Raises:
        InputError: a normalisation forgets the unit.
    """
    units = []
    for channel, scheme in enumerate(schemes):
        if scheme == "CTNormalization":
            found = intensities[str(channel)]
            units.append((max(float(found["std"]), 1e-8), float(found["mean"])))  # as nnU-Net divides
        elif scheme == "NoNormalization":
            units.append((1.0, 0.0))
        else:
            raise InputError(
                f"channel {channel} of the plans has {scheme}, and Hi-End-MAE needs Hounsfield units: write "
                f'"channel_names": {{"{channel}": "CT"}} into dataset.json, then plan and preprocess again'
            )
    return units


def cut_window(
    schemes: Sequence[str], intensities: Mapping[str, Mapping[str, float]], window: Sequence[float]
) -> str | None:
    """Tell which part of the window CTNormalization has cut off, as it clips to percentiles of the foreground.

    Args:
        schemes: as for :func:`units_of_channels`.
        intensities: as for :func:`units_of_channels`.
        window: HU that become 0 and 1.

    Returns:
        A sentence for the log; none where the plans keep the whole window.
    """
    low, high = window
    for channel, scheme in enumerate(schemes):
        if scheme == "CTNormalization":
            found = intensities[str(channel)]
            first, last = float(found["percentile_00_5"]), float(found["percentile_99_5"])
            if first > low or last < high:
                return (
                    f"the plans clip channel {channel} to {first:.0f} .. {last:.0f} HU, and the encoder knows "
                    f'{low:.0f} .. {high:.0f}. To keep them all, write "channel_names": {{"{channel}": "noNorm"}} into '
                    "dataset.json, then plan and preprocess again"
                )
    return None


def direction_to_affine(direction: Sequence[float]) -> np.ndarray:
    """Return the affine [4, 4] to RAS of a direction of SimpleITK, nine numbers to LPS; without spacing and origin."""
    return nib.affines.from_matvec(np.diag([-1.0, -1.0, 1.0]) @ np.reshape(direction, (3, 3)))


def mirrored_axes(affines: Iterable[tuple[str, np.ndarray]]) -> tuple[bool, bool, bool]:
    """Return which of the axes X, Y and Z run against RAS, the same in all scans.

    Args:
        affines: name of each scan and its affine [4, 4] to RAS; none where the reader turns them.

    Returns:
        For X, Y and Z whether voxels run to the left, to the back, to the feet.

    Raises:
        InputError: scans differ, or the axes of one are in another order than left-right, front-back, head-feet.
    """
    codes = {name: "".join(nib.aff2axcodes(affine)) for name, affine in affines}
    first, orientation = next(iter(codes.items()), ("", "RAS"))
    for name, code in codes.items():
        if code != orientation:
            raise InputError(
                f"scans are stored in different orientations ({first} is {orientation}, {name} is {code}), and this "
                f"data set's reader keeps them: {_READER_ADVICE}"
            )
    if [letter in pair for letter, pair in zip(orientation, ("LR", "AP", "IS"), strict=True)] != [True] * 3:
        raise InputError(
            f"{first} is stored as {orientation}, whose axes are in another order than RAS, and this data set's reader "
            f"keeps it: {_READER_ADVICE}"
        )
    x, y, z = (letter not in "RAS" for letter in orientation)
    return x, y, z


class PlannedUNETR(nn.Module):
    """A HiEndUNETR on arrays of nnU-Net.

    How scans lie, and the encoder's window, are part of its state_dict: prediction has neither scans nor encoder file.

    Args:
        patch_size: of the plans, in voxels of nnU-Net's arrays.
        axes: which spatial axes of the arrays are X, Y and Z; see :func:`axes_of_planes`.
        units: of each channel; see :func:`units_of_channels`.
        out_channels: nnU-Net's segmentation heads.
        network: further arguments of :class:`HiEndUNETR`, such as :data:`PUBLISHED` or :data:`SMALL`.

    Raises:
        InputError: the patch has not three axes.
    """

    factor: Tensor
    offset: Tensor

    def __init__(
        self,
        patch_size: Sequence[int],
        axes: Sequence[int],
        units: Sequence[tuple[float, float]],
        out_channels: int,
        network: Mapping[str, Any],
    ) -> None:
        super().__init__()
        if len(patch_size) != 3:
            raise InputError(f"the plans' patch {list(patch_size)} is 2D: choose 3d_fullres, or 3d_lowres if planned")
        self.axes = [axis + 2 for axis in axes]
        self.patch = int(network["patch_size"])
        self.mirrored = (False, False, False)
        self.window = WINDOW
        size = [-(-patch_size[axis] // self.patch) * self.patch for axis in axes]
        self.segmenter = HiEndUNETR(in_channels=len(units), out_channels=out_channels, img_size=size, **network)
        factors, offsets = torch.tensor(units).reshape(-1, 2, 1, 1, 1).unbind(1)
        self.register_buffer("factor", factors, persistent=False)  # the plans have them
        self.register_buffer("offset", offsets, persistent=False)

    def get_extra_state(self) -> Tensor:
        """Return how scans lie and the window: five numbers, as a tensor because nnU-Net asks all state for a shape."""
        return torch.tensor([*map(float, self.mirrored), *self.window], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take what :meth:`get_extra_state` gave."""
        x, y, z, low, high = state.tolist()
        self.mirrored, self.window = (bool(x), bool(y), bool(z)), (low, high)

    def prepare(self, image: Tensor) -> Tensor:
        """Make the encoder's input of nnU-Net's array.

        Args:
            image: [B, C, ...] in the plans' order of axes and normalisation.

        Returns:
            [B, C, X, Y, Z] in RAS, the window as 0 to 1, padded with 0 on both sides to multiples of the patch.
        """
        low, high = self.window
        x = ((image * self.factor + self.offset - low) / (high - low)).clamp(0, 1)
        x = torch.flip(x.permute(0, 1, *self.axes), self.flips())
        return F.pad(x, [side for n in reversed(x.shape[2:]) for side in self.padding(n)])

    def forward(self, image: Tensor) -> Tensor:
        """Segment nnU-Net's array [B, C, ...] to logits [B, out_channels, ...] on the same voxels."""
        logits = self.segmenter(self.prepare(image))
        for axis, place in enumerate(self.axes, start=2):
            logits = logits.narrow(axis, self.padding(image.shape[place])[0], image.shape[place])
        back = [self.axes.index(place) + 2 for place in (2, 3, 4)]
        return torch.flip(logits, self.flips()).permute(0, 1, *back).contiguous()

    def flips(self) -> list[int]:
        """Return the axes of [B, C, X, Y, Z] that are to be mirrored."""
        return [axis for axis, mirrored in enumerate(self.mirrored, start=2) if mirrored]

    def padding(self, size: int) -> tuple[int, int]:
        """Return the voxels to add before and behind `size`, as MONAI's symmetric padding has them."""
        missing = -size % self.patch
        return missing // 2, missing - missing // 2
