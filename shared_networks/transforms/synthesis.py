"""Draw synthetic CTs from tissue maps while training: crop and warp a map, then give it Hounsfield units."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable
from monai.utils import convert_to_tensor, ensure_tuple_rep
from scipy.spatial.transform import Rotation
from torch import Tensor

from shared_networks.errors import InputError
from shared_networks.synthetic.appearance import (
    along,
    bumps,
    checked_amounts,
    checked_range,
    checked_variety,
    draw_scan,
)
from shared_networks.synthetic.tissue_table import TissueTable, read_tissue_table

_CANDIDATES = 4096  # voxels among which a crop's centre is sought: an adrenal gland is met every second time
_COARSE_MM, _FINE_MM = 70.0, 25.0  # over which a body is deformed


class RandCropWarpd(Randomizable, MapTransform):
    """Crop, turn, scale and deform label maps in one nearest-neighbour sampling, onto the grid of training.

    MONAI's transforms need several samplings, of which the elastic one alone takes a multiple of the time. The result's
    affine leads to the place in the source, but for the deformation. What lies outside of the source is 0.

    Args:
        keys: of maps `[C, H, W, D]` of one shape, in one orientation; all get the same crops.
        spatial_size: voxels of a crop.
        spacing: voxel size of a crop in mm.
        num_samples: crops of a case.
        label_key: of the organ labels; without it no crop is centred on an organ by intention.
        centres: weights of crops about an organ, each organ alike, about the body and about any place.
        body_key: of the map that is above 0 in the body; by default the first of `keys`.
        rotation: largest turn about each axis in degrees.
        zoom: least and largest scale.
        stretch: share by which an axis is scaled more or less than the others, at most.
        deformation: largest standard deviation in mm of smooth shifts over 70 mm, and over 25 mm.

    Raises:
        InputError: an argument from `centres` on is no range or number that can be drawn with.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_size: Sequence[int] | int,
        spacing: Sequence[float] | float,
        num_samples: int = 1,
        label_key: str | None = None,
        centres: Sequence[float] = (2, 1, 1),
        body_key: str | None = None,
        rotation: Sequence[float] = (4, 4, 10),
        zoom: Sequence[float] = (0.85, 1.18),
        stretch: float = 0.05,
        deformation: Sequence[float] = (5, 1.2),
    ) -> None:
        super().__init__(keys)
        self.size = ensure_tuple_rep(spatial_size, 3)
        self.spacing = np.array(ensure_tuple_rep(spacing, 3), float)
        self.num_samples = num_samples
        self.label_key, self.body_key = label_key, body_key or self.keys[0]
        self.centres = np.array(checked_amounts("centres", centres, 3)) * ([label_key is not None, 1, 1])
        if not self.centres.any():
            raise InputError(f"centres of drawn CTs is {centres!r}; give a weight above 0 to the body or to any place")
        self.rotation = checked_amounts("rotation", rotation, 3)
        self.zoom = checked_range("zoom", zoom, above_zero=True)
        [self.stretch] = checked_amounts("stretch", [stretch], most=1)
        self.deformation = checked_amounts("deformation", deformation, 2)

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        """Return `num_samples` crops of a case.

        Raises:
            InputError: the maps have different shapes.
        """
        maps = {key: convert_to_tensor(data[key], track_meta=True) for key in self.key_iterator(data)}
        shapes = {key: tuple(volume.shape[1:]) for key, volume in maps.items()}
        if len(set(shapes.values())) > 1:
            raise InputError(f"maps have different shapes, {shapes}; resample them to one grid")
        rest = {key: value for key, value in data.items() if key not in maps}
        return [{**rest, **self.crop(maps)} for _ in range(self.num_samples)]

    def crop(self, maps: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        """Return one crop of all maps."""
        source = maps[self.body_key]
        shape = np.array(source.shape[1:])
        voxel = np.linalg.norm(np.asarray(source.affine, float)[:3, :3], axis=0)
        step, half = self.draw_steps() / voxel[:, None], (np.array(self.size) - 1) / 2
        reach = np.abs(np.diag(step)) * half
        between = (np.array(self.size) % 2 == 0) / 2  # the middle of an even number of voxels
        centre = (self.draw_centre(maps) - between).clip(reach, np.maximum(shape - 1 - reach, reach))
        centre = np.where(2 * reach >= shape - 1, (shape - 1) / 2, centre)
        to_source = np.eye(4)
        to_source[:3, :3], to_source[:3, 3] = step, centre - step @ half
        index, outside = self.sample(to_source, shape, voxel)
        crops = {}
        for key, volume in maps.items():
            values = volume.as_tensor().reshape(len(volume), -1).index_select(1, index)
            values[:, outside] = 0
            affine = torch.as_tensor(np.asarray(volume.affine, float) @ to_source)
            meta = {**volume.meta, "affine": affine, "spatial_shape": np.array(self.size)}
            crops[key] = MetaTensor(values.view(-1, *self.size), meta=meta)
        return crops

    def draw_steps(self) -> np.ndarray:
        """Draw the matrix `[3, 3]` from voxels of the crop to mm of the source."""
        turn = Rotation.from_euler("xyz", self.R.uniform(-1, 1, 3) * self.rotation, degrees=True).as_matrix()
        zoom = np.exp(self.R.uniform(*np.log(self.zoom))) * (1 + self.R.uniform(-self.stretch, self.stretch, 3))
        return turn * (self.spacing / zoom)

    def draw_centre(self, maps: Mapping[Hashable, MetaTensor]) -> np.ndarray:
        """Draw the voxel `[3]` about which to crop."""
        shape = maps[self.body_key].shape[1:]
        kind = self.R.choice(3, p=self.centres / self.centres.sum())
        candidates = torch.from_numpy(self.R.randint(0, int(np.prod(shape)), _CANDIDATES))
        chosen = candidates
        if kind < 2:
            volume = maps[self.label_key if kind == 0 else self.body_key]  # type: ignore[index]
            values = volume.as_tensor()[0].reshape(-1)[candidates]
            present = values[values > 0].unique()
            if kind == 0 and len(present):
                chosen = candidates[values == present[self.R.randint(len(present))]]
            elif len(present):
                chosen = candidates[values > 0]
        return np.array(np.unravel_index(int(chosen[0]), shape), float)

    def sample(self, to_source: np.ndarray, shape: np.ndarray, voxel: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return flat indices of the source for each voxel of a crop, and which lie outside, `[voxels]` each."""
        amplitudes = self.R.uniform(0, 1, 2) * self.deformation
        fields = [
            (amplitude, [bumps(n, s, scale) for n, s in zip(self.size, self.spacing, strict=True)])
            for amplitude, scale in zip(amplitudes, (_COARSE_MM, _FINE_MM), strict=True)
        ]
        flat: Any = 0
        outside = torch.zeros(self.size, dtype=torch.bool)
        for axis, length in enumerate(shape.tolist()):
            row = [
                torch.from_numpy((to_source[axis, a] * np.arange(n)).astype(np.float32))
                for a, n in enumerate(self.size)
            ]
            at = row[0][:, None, None] + row[1][:, None] + (row[2] + float(to_source[axis, 3]))
            for amplitude, bases in fields:
                shift = torch.from_numpy(self.R.standard_normal([b.shape[1] for b in bases]).astype(np.float32))
                shift *= amplitude / voxel[axis]
                for a, basis in enumerate(bases):
                    shift = along(shift, basis, a)
                at += shift
            index = at.round_().int()
            outside |= (index < 0) | (index >= length)
            flat = flat * length + index.clamp_(0, length - 1)
        return flat.view(-1), outside.view(-1)


class DrawCTd(MapTransform):
    """Draw a CT in Hounsfield units of each tissue map, always the same one of a file: for validation.

    Args:
        keys: of tissue maps `[1, H, W, D]`, indices of any type into the table.
        table: file of the tissues; see :func:`shared_networks.synthetic.tissue_table.read_tissue_table`.
        spacing: voxel size in mm; by default the map's affine tells.
        label_key: of labels that are cleared where the field of view ends.
        seed: of the drawing, together with the file's name.
        allow_missing_keys: whether a case may lack some of the maps.
        variety: arguments of :class:`shared_networks.synthetic.appearance.Variety`: how much scans differ.

    Raises:
        InputError: the table cannot be read, or an argument of the variety is unknown or no range.
    """

    def __init__(
        self,
        keys: KeysCollection,
        table: str | Path,
        spacing: Sequence[float] | float | None = None,
        label_key: str | None = None,
        seed: int = 0,
        allow_missing_keys: bool = False,
        **variety: Any,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.table: TissueTable = read_tissue_table(table)
        self.spacing = None if spacing is None else np.array(ensure_tuple_rep(spacing, 3), float)
        self.label_key, self.seed, self.variety = label_key, seed, checked_variety(variety)

    def generator(self, volume: MetaTensor) -> np.random.Generator:
        """Return the source of variation of a map: its seed and its file's name."""
        name = PurePath(str(volume.meta.get("filename_or_obj", ""))).name
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw.

        Raises:
            InputError: a map has an index that is not in the table, or several channels.
        """
        out = dict(data)
        for key in self.key_iterator(out):
            volume = convert_to_tensor(out[key], track_meta=True)
            if len(volume) != 1:
                raise InputError(f"a tissue map has {len(volume)} channels; give one")
            spacing = np.asarray(volume.pixdim, float) if self.spacing is None else self.spacing
            try:
                drawn = draw_scan(self.generator(volume), volume.as_tensor()[0], spacing, self.table, self.variety)
            except InputError as error:
                raise InputError(f"{volume.meta.get('filename_or_obj', key)}: {error}") from None
            out[key] = MetaTensor(drawn.hu[None], meta=volume.meta)
            if self.label_key is not None and drawn.unseen is not None:
                label = convert_to_tensor(out[self.label_key], track_meta=True)
                out[self.label_key] = label.masked_fill(drawn.unseen, 0)
        return out


class RandDrawCTd(DrawCTd, Randomizable):
    """Draw a new CT in Hounsfield units of each tissue map at every call: for training.

    Args:
        keys: of tissue maps `[1, H, W, D]`, indices of any type into the table.
        table: file of the tissues; see :func:`shared_networks.synthetic.tissue_table.read_tissue_table`.
        spacing: voxel size in mm; by default the map's affine tells.
        label_key: of labels that are cleared where the field of view ends.
        variety: arguments of :class:`shared_networks.synthetic.appearance.Variety`: how much scans differ.

    Raises:
        InputError: the table cannot be read, or an argument of the variety is unknown or no range.
    """

    def __init__(
        self,
        keys: KeysCollection,
        table: str | Path,
        spacing: Sequence[float] | float | None = None,
        label_key: str | None = None,
        **variety: Any,
    ) -> None:
        super().__init__(keys, table, spacing, label_key, **variety)

    def generator(self, volume: MetaTensor) -> np.random.Generator:
        """Return a new source of variation, which the transform's random state seeds."""
        return np.random.default_rng(self.R.randint(0, 2**32, 2, dtype=np.uint32))


def drawing_digests(train: Sequence[Any], validation: Sequence[Any]) -> dict[str, str]:
    """Return what CTs that are drawn depend on beside the tissue maps, for the record of a training.

    Args:
        train: transforms that prepare the cases that train.
        validation: transforms that prepare those that choose the model.

    Returns:
        SHA-256 of the tables' values, `tissue_table`, and of the other arguments of all drawing, `ranges`.

    Raises:
        InputError: training draws no CT.
    """
    if not any(isinstance(transform, RandDrawCTd) for transform in train):
        raise InputError(
            "configs/synthetic.json is given, but another overlay has train#random_transforms too, so that no CT is "
            "drawn to train on; leave one of the two out"
        )
    drawings = [transform for transform in (*train, *validation) if isinstance(transform, DrawCTd)]
    varieties = [
        {name: np.array(value, float).tolist() for name, value in drawing.variety._asdict().items()}
        for drawing in drawings
    ]
    seeds = [[type(drawing).__name__, drawing.seed] for drawing in drawings]
    values = {
        "tissue_table": [[column.tolist() for column in drawing.table[1:-1]] for drawing in drawings],
        "ranges": [seeds, varieties],
    }
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in values.items()}
