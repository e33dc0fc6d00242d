"""Read random and central crops of a store."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable
from numpy.typing import NDArray

from shared_networks.errors import InputError
from shared_networks.store.format import LEVELS, Volume, centres_file, open_volume, prefetch, read_box


class Crop(NamedTuple):
    """One crop of a volume and what is done to it, in this order.

    Attributes:
        start: first voxel on each axis of the stored volume; 0 where the volume is smaller than the crop.
        flips: whether each axis is reversed.
        turns: quarter turns from the first spatial axis to the second, as :func:`numpy.rot90` counts them.
        factor: by which intensities are multiplied.
        offset: added to intensities then.
    """

    start: tuple[int, ...]
    flips: tuple[bool, ...] = (False, False, False)
    turns: int = 0
    factor: float = 1.0
    offset: float = 0.0


class RandReadCropsd(Randomizable, MapTransform):
    """Read random crops of a prepared case, augmented as published.

    It stands for `RandCropByPosNegLabeld`, three `RandFlipd`, `RandRotate90d`, `RandScaleIntensityd` and
    `RandShiftIntensityd` of train.json, with the same distributions. Crops lie inside the volume; a volume that is
    smaller than the crop gets zeros on both sides. All is drawn from `self.R`, so `set_random_state` decides the crops.
    No file stays open between calls. A file that is missing, unreadable or cut short, even while it is read, raises an
    `InputError`.

    Args:
        keys: of the file in the item of :func:`read_manifest`, `"image"`.
        img_size: of the crops, `[h, w, d]` voxels.
        num_samples: crops a call.
        pos: a crop is centred on foreground (above the window's floor) with probability `pos / (pos + neg)`.
        neg: otherwise its centre is any other voxel of the stored volume.
        flip_prob: of each axis.
        rotate_prob: of a quarter, half or three quarters turn in the first two axes; where they differ in size, of
            the half turn only.
        scale_prob: of a factor of intensity in [1 - scale, 1 + scale].
        scale: see `scale_prob`.
        shift_prob: of an offset of intensity in [-shift, shift].
        shift: see `shift_prob`.

    Attributes:
        crops: the draws of the last call.
    """

    def __init__(
        self,
        keys: KeysCollection,
        img_size: Sequence[int],
        num_samples: int = 8,
        pos: float = 6,
        neg: float = 2,
        flip_prob: float = 0.5,
        rotate_prob: float = 0.3,
        scale_prob: float = 0.1,
        scale: float = 0.1,
        shift_prob: float = 0.1,
        shift: float = 0.1,
    ) -> None:
        super().__init__(keys)
        if pos < 0 or neg < 0 or pos + neg == 0:
            raise InputError(f"pos and neg are {pos} and {neg}; give two shares of which one is above 0")
        self.img_size, self.num_samples = tuple(img_size), num_samples
        self.foreground_prob = pos / (pos + neg)
        self.flip_prob, self.rotate_prob = flip_prob, rotate_prob
        self.scale_prob, self.scale, self.shift_prob, self.shift = scale_prob, scale, shift_prob, shift
        self.crops: list[Crop] = []

    def randomize(self, data: Any) -> None:
        """Draw the crops.

        Args:
            data: `[2, N, 3]` centres, and the shape `[C, H, W, D]` of the volume.
        """
        centres, shape = data
        self.crops = [self._draw(centres, shape[1:]) for _ in range(self.num_samples)]

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        """Read `num_samples` crops: dicts with `image`, `[C, h, w, d]` float32, and `case`."""
        [key] = self.keys
        file, shape = data[key], data["shape"]
        with open_volume(file, shape) as volume:
            self.randomize((_read_centres(file), shape))
            for crop in self.crops:
                prefetch(volume, crop.start, self.img_size)
            return [{key: _read_crop(volume, shape, crop, self.img_size), "case": data["case"]} for crop in self.crops]

    def _draw(self, centres: NDArray[np.int16], shape: Sequence[int]) -> Crop:
        voxels = centres[int(self.R.random_sample() >= self.foreground_prob)]
        centre = voxels[self.R.randint(len(voxels))]
        start = tuple(
            min(max(int(c) - size // 2, 0), max(n - size, 0))
            for c, size, n in zip(centre, self.img_size, shape, strict=True)
        )
        flips = tuple(self.R.random_sample(3) < self.flip_prob)
        turns = 0
        if self.R.random_sample() < self.rotate_prob:
            turns = self.R.randint(3) + 1 if self.img_size[0] == self.img_size[1] else 2
        factor = 1 + self.R.uniform(-self.scale, self.scale) if self.R.random_sample() < self.scale_prob else 1.0
        offset = self.R.uniform(-self.shift, self.shift) if self.R.random_sample() < self.shift_prob else 0.0
        return Crop(start, flips, turns, factor, offset)


class ReadCentralCropd(MapTransform):
    """Read the middle of a prepared case, as `CropForegroundd`, `SpatialPadd` and `CenterSpatialCropd` leave it.

    Args:
        keys: of the file in the item of :func:`read_manifest`, `"image"`.
        img_size: of the crop, `[h, w, d]` voxels.
    """

    def __init__(self, keys: KeysCollection, img_size: Sequence[int]) -> None:
        super().__init__(keys)
        self.img_size = tuple(img_size)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read a dict with `image`, `[C, h, w, d]` float32, and `case`."""
        [key] = self.keys
        shape = data["shape"]
        start = tuple(max(n // 2 - size // 2, 0) for n, size in zip(shape[1:], self.img_size, strict=True))
        with open_volume(data[key], shape) as volume:
            prefetch(volume, start, self.img_size)
            return {key: _read_crop(volume, shape, Crop(start), self.img_size), "case": data["case"]}


def _read_centres(file: str | Path) -> NDArray[np.int16]:
    try:
        return np.load(centres_file(file)).reshape(2, -1, 3)
    except (ValueError, EOFError):  # np.load says so of a file that is cut short
        raise InputError(f"{centres_file(file)}: is damaged or cut short; remove it and prepare again") from None


def _read_crop(volume: Volume, shape: Sequence[int], crop: Crop, size: Sequence[int]) -> torch.Tensor:
    inside = [min(n, have) for n, have in zip(size, shape[1:], strict=True)]
    voxels = read_box(volume, crop.start, inside)
    if inside != list(size):
        before = [(n - have) // 2 for n, have in zip(size, inside, strict=True)]
        around = [(b, n - have - b) for b, n, have in zip(before, size, inside, strict=True)]
        voxels = np.pad(voxels, [(0, 0), *around])
    if crop.flips[2]:  # numpy is slow where the innermost step is negative
        voxels = torch.from_numpy(voxels.view(np.int16)).flip(3).numpy().view(np.uint16)
    voxels = np.flip(voxels, tuple(axis + 1 for axis in (0, 1) if crop.flips[axis]))
    voxels = np.rot90(voxels, crop.turns, (1, 2))
    image = np.empty(voxels.shape, np.float32)
    np.multiply(voxels, np.float32(crop.factor / LEVELS), out=image)
    if crop.offset:
        image += np.float32(crop.offset)
    return torch.from_numpy(image)
