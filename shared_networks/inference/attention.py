"""Where a chosen place in a scan looks: attention maps of encoder and decoder on the scan's own grid."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, SpatialCrop
from monai.utils import convert_to_numpy, ensure_tuple, ensure_tuple_rep
from nibabel.affines import apply_affine, voxel_sizes
from scipy.ndimage import affine_transform
from torch import Tensor, nn

from shared_networks.datasets.nifti import Nifti, grid_problems, read_nifti
from shared_networks.datasets.pairs import UnpairedError, case_name, find_labels, named_case, pair_cases, source_file
from shared_networks.datasets.scans import BadScanError, Scan, Source
from shared_networks.errors import InputError
from shared_networks.figures.attention import attention_figure
from shared_networks.figures.planes import orthogonal_planes, shown_channel
from shared_networks.files import atomic_write
from shared_networks.inference.features import token_affine
from shared_networks.inference.predict import scan_stamp
from shared_networks.inference.save import label_image
from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.networks.vit import attention_maps


def organ_voxel(organ: np.ndarray, spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the voxel of an organ that is closest to its centroid, so that it lies in a curved organ too.

    Args:
        organ: [X, Y, Z], true in the organ, which has at least one voxel.
        spacing: millimetres along (X, Y, Z).
    """
    voxels = np.argwhere(organ)
    distances = np.square((voxels - voxels.mean(axis=0)) * spacing).sum(axis=1)
    return tuple(voxels[distances.argmin()].tolist())


class QueryVoxel:
    """Find the voxel asked for in a scan: by its indices, or as the one in the middle of an organ.

    Args:
        scans: that are looked at.
        dataset_dir: the data set they come from.
        folder: the scans' folder; labels are read from the one named alike (`imagesTr`: `labelsTr`).
        voxel: indices (i, j, k) in the scan's file, or
        label: the organ's value, whose voxel :func:`organ_voxel` chooses.

    Raises:
        InputError: both or neither are asked for, the voxel is not three integers, or no folder has the labels.
    """

    def __init__(
        self,
        scans: Sequence[Source],
        dataset_dir: str | Path,
        folder: str,
        voxel: Sequence[int] | None = None,
        label: int | None = None,
    ) -> None:
        if (voxel is None) == (label is None):
            raise InputError(
                f'voxel is {voxel} and label is {label}: give exactly one, --voxel "[i,j,k]" in the scan\'s own '
                "indices or --label N, an organ's value"
            )
        if voxel is not None and (len(ensure_tuple(voxel)) != 3 or not all(isinstance(n, int) for n in voxel)):
            raise InputError(f'voxel is {voxel}: give three integers, --voxel "[i,j,k]"')
        self.voxel, self.label = voxel, label
        self.folder = Path(dataset_dir) / folder.replace("images", "labels")
        self.labels: dict[str, str] = {}
        if label is None:
            return
        if not self.folder.is_dir():
            raise InputError(
                f"{self.folder}: no such folder, so there is no label {label} to look for; give --folder imagesTr to "
                'read imagesTr and labelsTr, or --voxel "[i,j,k]"'
            )
        try:
            pairs = pair_cases([scan.files[0] for scan in scans], find_labels(dataset_dir, self.folder.name))
        except UnpairedError as error:  # a scan without label costs itself alone
            pairs = error.pairs
        self.labels = {pair["image"]: pair["label"] for pair in pairs}

    def __call__(self, source: Source, scan: Scan) -> dict[str, Any]:
        """Return `voxel`, (i, j, k).

        Raises:
            BadScanError: the scan has no such voxel or organ, or its label cannot be used.
        """
        shape = scan.image.shape[1:]
        voxel = self.middle(source, scan) if self.voxel is None else tuple(self.voxel)
        if not all(0 <= n < size for n, size in zip(voxel, shape, strict=True)):
            raise BadScanError(f"voxel {list(voxel)} is outside its {shape} voxels; indices count from 0")
        return {"voxel": voxel}

    def middle(self, source: Source, scan: Scan) -> tuple[int, ...]:
        """Return the voxel in the middle of the organ."""
        file = self.labels.get(source.files[0])
        if file is None:
            raise BadScanError(f"no label in {self.folder}; add {case_name(source.files)}.nii.gz or give --voxel")
        found = read_nifti(file, is_label=True)
        image = Nifti([], (scan.image.shape[1:], scan.affine))
        problems = [f"{file}: {problem}" for problem in found.problems]
        problems += grid_problems(source.files[0], image, file, found)
        if problems or found.values is None:
            raise BadScanError("; ".join(problems))
        organ = found.values == self.label
        if not self.label or not organ.any():
            present = np.unique(found.values[found.values > 0]).astype(int).tolist()
            raise BadScanError(f"{file}: no voxel has label {self.label}; its labels are {present}")
        return organ_voxel(organ, voxel_sizes(scan.affine))

    def stamp(self, source: Source) -> str:
        """Return a text that changes with a scan, or with its label where an organ is asked for."""
        label = self.labels.get(source.files[0])
        return scan_stamp(source) + (f"; {scan_stamp(Source('', (label,)))}" if label else "")


class QueryWindowd(MapTransform):
    """Crop the window around a query that the network will see, and number the token that holds it.

    The window is placed so that the query lies in the middle of its patch and that patch in the middle of the window,
    as far as the scan reaches: a window goes beyond the scan only where the scan is smaller.

    Args:
        keys: key of the prepared image [C, H, W, D], a MetaTensor at least as large as the window.
        img_size: (H, W, D) of the window in voxels.
        patch_size: patch size in voxels, one number or (p_h, p_w, p_d).
        voxel_key: key of the query's indices (i, j, k) in the scan's file.

    Returns:
        The data with the image cropped, `query`, the token's number in row-major (h, w, d) order, and the voxel as
        an array.

    Raises:
        InputError: on call, if the window holds nothing above the floor of intensities.
    """

    def __init__(
        self,
        keys: KeysCollection,
        img_size: Sequence[int] | int,
        patch_size: Sequence[int] | int,
        voxel_key: str = "voxel",
    ) -> None:
        super().__init__(keys)
        self.size = np.array(ensure_tuple_rep(img_size, 3))
        self.patch = np.array(ensure_tuple_rep(patch_size, 3))
        self.voxel_key = voxel_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop one case."""
        out = dict(data)
        voxel = np.array(out[self.voxel_key])
        for key in self.key_iterator(out):
            image = out[key]
            corner = convert_to_numpy(image.meta["spatial_shape"]) - 1
            to_image = np.linalg.inv(convert_to_numpy(image.affine)) @ convert_to_numpy(image.meta["original_affine"])
            index, *ends = np.rint(apply_affine(to_image, [voxel, 0 * voxel, corner])).astype(int)
            first, last = np.min(ends, axis=0), np.max(ends, axis=0)
            start = index - self.size // self.patch // 2 * self.patch - self.patch // 2
            start = start.clip(first, (last + 1 - self.size).clip(first))
            start = start.clip(0, np.array(image.shape[1:]) - self.size)
            token = (index - start).clip(0, self.size - 1) // self.patch
            out[key] = SpatialCrop(roi_start=start, roi_end=start + self.size)(image)
            if not (out[key] > 0).any():
                raise InputError(f"only air around voxel {voxel.tolist()}; ask for a voxel of the body")
            out["query"] = int(np.ravel_multi_index(token, self.size // self.patch))
        out[self.voxel_key] = voxel
        return out


class QueryAttention(nn.Module):
    """A pre-training network, handing out the attention of one query token by feature, mean over heads.

    Args:
        network: in eval mode, so that it hides the same patches at every call.
    """

    def __init__(self, network: HiEndMAE) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, query: Tensor) -> dict[str, Tensor]:
        """Watch a query.

        The encoder sees all patches. For the decoder the query is masked, with the patches that the network's own mask
        hides: its mask token asks, in the cross block that reads a feature, the patches that the encoder saw.

        Args:
            image: [B, C, H, W, D], sizes a multiple of the patch size.
            query: [B], a token's number for each image, in row-major (h, w, d) order.

        Returns:
            `encoder_block_N`, attention inside the encoder block with zero-based index N, and `cross_block_N`, the
            decoder's attention to that block's features. Each is [B, 1, h, w, d] in float32 and sums to 1 less the
            share of the CLS token. Masked patches have 0 in `cross_block_N`.
        """
        grid = self.network.vit.patch_grid(image)
        batch, length = image.shape[0], math.prod(grid)
        blocks = self.network.vit.out_indices
        rows = torch.arange(batch, device=image.device)
        with attention_maps(self.network) as maps:
            self.network.vit(image)
        weights = {
            f"encoder_block_{n}": maps[f"vit.blocks.{n}.attn"].float().mean(dim=1)[rows, 1 + query, 1:] for n in blocks
        }
        ids_shuffle = query_last(self.network.shuffle(batch, length).to(image.device), query)
        visible = ids_shuffle[:, : self.network.num_visible(length)]
        with attention_maps(self.network) as maps:
            self.network(image, ids_shuffle)
        for depth, n in reversed([*enumerate(reversed(blocks))]):  # cross blocks read the deepest block first
            seen = maps[f"decoder.cross_blocks.{depth}.cross_attn"].float().mean(dim=1)[:, -1, 1:]
            weights[f"cross_block_{n}"] = seen.new_zeros(batch, length).scatter(1, visible, seen)
        return {name: w.reshape(batch, 1, *grid) for name, w in weights.items()}


def query_last(ids_shuffle: Tensor, query: Tensor) -> Tensor:
    """Move a token to the end of each row of `ids_shuffle` [B, L], where it is masked; the others keep their order.

    Args:
        ids_shuffle: [B, L], each row a shuffle of the token numbers.
        query: [B], the tokens to move.
    """
    order = (ids_shuffle == query[:, None]).int().argsort(dim=1, stable=True)
    return ids_shuffle.gather(1, order)


def to_scan_grid(tokens: np.ndarray, affine: np.ndarray, scan_affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Give each voxel of a scan the value of the token whose patch it lies in, 0 where there is none.

    Args:
        tokens: [h, w, d].
        affine: [4, 4] of the tokens, see :func:`token_affine`.
        scan_affine: [4, 4], from the scan's voxel indices to RAS millimetres.
        shape: (X, Y, Z) of the scan.

    Returns:
        [X, Y, Z] in float32.
    """
    to_tokens = np.linalg.inv(affine) @ scan_affine
    # `grid-constant`, as `constant` would cut the outermost patches at their centres.
    return affine_transform(
        tokens.astype(np.float32), to_tokens, output_shape=tuple(shape), order=0, mode="grid-constant", cval=0.0
    )


class SaveAttentiond(MapTransform):
    """Write the attention maps of a query in one of :class:`Scans` on its own grid, and a figure of them.

    For each map of :class:`QueryAttention` there is `{case}_{map}.nii.gz`, such as `ct_001_cross_block_9.nii.gz`,
    float32, one 3D file each so that any viewer lays it over the scan: a voxel holds the weight of the patch it lies
    in. The network sees one window, and attention does not reach beyond it: outside there are zeros.
    `{case}_attention.png` shows the maps in the axial slice through the query.

    Args:
        keys: key of the maps, a dict of [1, h, w, d].
        patch_size: patch size in voxels, one number or (p_h, p_w, p_d), as in the network.
        output_dir: folder of the files, created if need be.
        window: intensities of the scan shown as black and as white; `None` takes percentiles, for MR.
        image_key: key of the window [C, H, W, D] that the network saw.
        voxel_key: key of the query's indices (i, j, k) in the scan.
    """

    def __init__(
        self,
        keys: KeysCollection,
        patch_size: Sequence[int] | int,
        output_dir: str | Path,
        window: Sequence[float] | None = (-175.0, 250.0),
        image_key: str = "image",
        voxel_key: str = "voxel",
    ) -> None:
        super().__init__(keys)
        self.patch_size = ensure_tuple_rep(patch_size, 3)
        self.output_dir = Path(output_dir)
        self.window = window
        self.image_key = image_key
        self.voxel_key = voxel_key

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Write the files of one decollated case."""
        image, scan = data[self.image_key], convert_to_numpy(data["scan"][0])
        case, shape, voxel = named_case(data), scan.shape, convert_to_numpy(data[self.voxel_key]).tolist()
        scan_affine = convert_to_numpy(image.meta["original_affine"])  # in mm, whatever the unit of the file
        affine = token_affine(convert_to_numpy(image.affine), self.patch_size)

        maps: dict[str, dict[str, Any]] = {}
        for name, attention in data[self.keys[0]].items():
            volume = to_scan_grid(convert_to_numpy(attention[0]), affine, scan_affine, shape)
            with atomic_write(self.output_dir / f"{case}_{name}.nii.gz") as part:
                nib.save(label_image(volume, scan_affine, source_file(data["scan"]), "attention"), part)
            kind, feature = name.split("_", 1)
            maps.setdefault(kind, {})[feature.replace("_", " ")] = orthogonal_planes(volume, scan_affine, voxel)[0]
        figure = attention_figure(
            orthogonal_planes(scan, scan_affine, voxel)[0],
            maps,
            self.window,
            shown_channel(f"{case}   voxel {voxel}", len(data["scan"])),
        )
        with atomic_write(self.output_dir / f"{case}_attention.png") as part:
            figure.savefig(part, bbox_inches="tight")
        return data
