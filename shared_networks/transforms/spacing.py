"""Resample volumes to another voxel size, axis by axis and plane by plane."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.data import MetaTensor
from monai.transforms import Spacingd as MonaiSpacingd
from monai.transforms import SpatialResample
from torch import Tensor

from shared_networks.datasets.grid import SHEAR_TOLERANCE


class Axis(NamedTuple):
    """Positions of one axis' samples between another's.

    Attributes:
        lower: [N] index of the sample below.
        weight: [N] of the sample above, 0 to 1.
    """

    lower: Tensor
    weight: Tensor

    @classmethod
    def at(cls, position: Tensor, size: int) -> Axis:
        """Sample at positions [N] among `size` others; beyond the ends lies the end."""
        position = position.clamp(0, size - 1)
        lower = position.floor().clamp(max=max(size - 2, 0))
        return cls(lower.long(), (position - lower).float())


def resample_linear(volume: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """Interpolate trilinearly at the points of a grid with the volume's axes; beyond the border, the border goes on.

    Args:
        volume: [C, X, Y, Z] of any real type, in any memory order.
        positions: of the points, three of [N], in voxel indices along X, Y and Z.

    Returns:
        [C, N_x, N_y, N_z] float32.
    """
    # By planes along Z, whatever the memory order: results to the last bit then depend on the values alone. A file's
    # planes lie in one piece; other orders are copied, as reading a plane would touch the whole volume.
    source = volume.permute(3, 0, 2, 1)
    if volume.stride(3) < max(volume.stride()[1:]):
        source = source.contiguous()
    sizes = source.shape[0], *source.shape[2:]
    device = volume.device
    planes, rows, columns = (Axis.at(p.to(device), n) for p, n in zip(reversed(positions), sizes, strict=True))
    row_above, column_above = (
        (axis.lower + 1).clamp(max=n - 1) for axis, n in zip((rows, columns), sizes[1:], strict=True)
    )

    def in_plane(index: int) -> Tensor:
        plane = source[index].float()
        below, above = plane.index_select(1, rows.lower), plane.index_select(1, row_above)
        plane = torch.lerp(below, above, rows.weight[:, None])
        below, above = plane.index_select(2, columns.lower), plane.index_select(2, column_above)
        return torch.lerp(below, above, columns.weight)

    shape = (len(planes.lower), volume.shape[0], len(rows.lower), len(columns.lower))
    out = torch.empty(shape, device=device)
    known: dict[int, Tensor] = {}
    for target, lower, weight in zip(out, planes.lower.tolist(), planes.weight.tolist(), strict=True):
        pair = (lower, min(lower + 1, sizes[0] - 1))
        known = {index: known[index] if index in known else in_plane(index) for index in pair}
        torch.lerp(known[pair[0]], known[pair[1]], weight, out=target)
    return out.permute(1, 3, 2, 0)


class _Resample(SpatialResample):
    """MONAI's, but :func:`resample_linear` where that gives the same."""

    def __call__(
        self,
        img: Tensor,
        dst_affine: Tensor | None = None,
        spatial_size: Sequence[int] | Tensor | int | None = None,
        mode: str | int | None = None,
        padding_mode: str | None = None,
        align_corners: bool | None = None,
        dtype: Any = None,
        lazy: bool | None = None,
    ) -> Tensor:
        arguments = (dst_affine, spatial_size, mode, padding_mode, align_corners, dtype)
        is_lazy = self.lazy if lazy is None else lazy
        if is_lazy or not isinstance(img, MetaTensor) or (mode, padding_mode) != ("bilinear", "border"):
            return super().__call__(img, *arguments, lazy=lazy)
        planned: Any = super().__call__(img, *arguments, lazy=True)
        plan = planned.pending_operations[-1]
        shape, step = plan["lazy_shape"], plan["lazy_affine"].double()
        if (step[:3, :3] - step[:3, :3].diag().diag()).abs().max() * max(img.shape[1:]) > SHEAR_TOLERANCE:
            return super().__call__(img, *arguments, lazy=False)
        positions = [step[a, a] * torch.arange(n, dtype=torch.float64) + step[a, 3] for a, n in enumerate(shape)]
        out = MetaTensor(resample_linear(img.as_tensor(), positions))
        tracked = self.track_transform_meta(
            img,
            sp_size=shape,
            affine=step,
            extra_info=plan["extra_info"],
            orig_size=img.peek_pending_shape(),
            transform_info=self.get_transform_info(),
        )
        return out.copy_meta_from(tracked)


class Spacingd(MonaiSpacingd):
    """MONAI's `Spacingd` in a fraction of its memory and time where it interpolates linearly, to float32 rounding.

    Voxels may stay integers until here. Metadata under `image_*` that are no mapping, such as MONAI Label's
    `image_path`, are kept from MONAI, which takes each such item for a dict to update.

    Args:
        keys: of the volumes, [C, X, Y, Z].
        pixdim: voxel size in mm along the axes.
        settings: further arguments of `monai.transforms.Spacingd`.
    """

    def __init__(self, keys: Any, pixdim: Any, **settings: Any) -> None:
        super().__init__(keys, pixdim, **settings)
        stock = self.spacing_transform.sp_resample
        self.spacing_transform.sp_resample = _Resample(
            stock.mode, stock.padding_mode, stock.align_corners, stock.dtype, stock.lazy
        )

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Resample."""
        prefixes = tuple(f"{key}_" for key in self.keys)
        held = {k: v for k, v in data.items() if str(k).startswith(prefixes) and not isinstance(v, Mapping)}
        return {**super().__call__({k: v for k, v in data.items() if k not in held}, lazy), **held}
