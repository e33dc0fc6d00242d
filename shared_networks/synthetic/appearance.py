"""Give tissues Hounsfield units, texture and noise, as a scanner shows them.

All filters are small matrices along one axis, so that a crop takes some milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from shared_networks.errors import InputError
from shared_networks.synthetic.shapes import Array
from shared_networks.synthetic.tissue_table import TissueTable, phantom_tissues

Range = tuple[float, float]

LOWEST, HIGHEST = -1024.0, 3071.0
_METAL = 2000  # HU from which a tissue throws streaks
_MOST_IMPLANTS = 4


class Variety(NamedTuple):
    """How much scans differ.

    Attributes:
        contrast: chance of a scan with contrast medium.
        enhancement: factor on the table's enhancement.
        spread: factor on the table's spread between patients.
        variation_mm: distance over which a tissue's HU vary.
        texture: factor on the table's texture.
        texture_mm: standard deviation of the Gaussian that smooths the texture.
        kernel_mm: standard deviation of the reconstruction kernel in plane.
        sharpening: share of edge enhancement of the kernel.
        slice_mm: slice thickness.
        across: chance that slices lie across another axis than the last.
        noise_hu: standard deviation of the noise.
        noise_mm: standard deviation of the Gaussian that smooths the noise in plane.
        shading: HU that beam hardening and scatter add in places.
        streaks: HU that metal adds at its surface.
        shift: HU that the calibration is off at most.
        scale: share that the calibration is off at most.
        view: chance that the round field of view ends within the volume.
        end: chance that the scan ends within the volume.
    """

    contrast: float = 0.85
    enhancement: Range = (0.7, 1.3)
    spread: float = 1.0
    variation_mm: Range = (25, 70)
    texture: Range = (0.4, 1.4)
    texture_mm: Range = (1, 3.5)
    kernel_mm: Range = (0.25, 1.3)
    sharpening: Range = (0, 0.4)
    slice_mm: Range = (0.7, 7)
    across: float = 0.1
    noise_hu: Range = (3, 30)
    noise_mm: Range = (0.3, 1.2)
    shading: Range = (0, 8)
    streaks: Range = (50, 500)
    shift: float = 8
    scale: float = 0.015
    view: float = 0
    end: float = 0


USUAL = Variety()
CLINICAL = Variety(enhancement=(0.8, 1.2), spread=0.4, shift=3, scale=0.005, shading=(0, 4), streaks=(50, 300))
"""Of scans that are written once: as different as those of one hospital."""


_CHANCES = ("contrast", "across", "view", "end")
_ABOVE_ZERO = ("variation_mm", "slice_mm", "noise_hu", "streaks")  # what divides, or has its logarithm drawn


def checked_variety(arguments: Mapping[str, Any]) -> Variety:
    """Make a variety of the arguments that a config gives.

    Args:
        arguments: by name, of :class:`Variety`; ranges are lists or tuples.

    Raises:
        InputError: a name is unknown, or a value is no chance, amount or range.
    """
    if unknown := sorted(arguments.keys() - set(Variety._fields)):
        raise InputError(f"{unknown[0]!r} is no argument of drawn CTs; give one of {', '.join(Variety._fields)}")
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(Variety._field_defaults[name], tuple):
            values[name] = checked_range(name, value, name in _ABOVE_ZERO)
        else:
            [values[name]] = checked_amounts(name, [value], most=1 if name in _CHANCES else math.inf)
    return Variety(**values)


def checked_range(name: str, value: Any, above_zero: bool = False) -> Range:
    """Return a range of what is drawn, for which a config may give anything.

    Raises:
        InputError: it is not two numbers of at least 0, or above it, in order.
    """
    if not _are_amounts(value, 2) or value[0] > value[1] or (above_zero and value[0] == 0):
        least = "above 0" if above_zero else "of at least 0"
        raise InputError(f"{name} of drawn CTs is {value!r}; give two numbers {least}, the lower one first")
    return value[0], value[1]


def checked_amounts(name: str, values: Any, count: int = 1, most: float = math.inf) -> list[float]:
    """Return numbers that what is drawn depends on, for which a config may give anything.

    Raises:
        InputError: they are not so many numbers from 0 to the most.
    """
    if not _are_amounts(values, count) or max(values) > most:
        what = "a number" if count == 1 else f"{count} numbers"
        limits = "of at least 0" if most == math.inf else f"from 0 to {most:g}"
        given = values[0] if count == 1 else values
        raise InputError(f"{name} of drawn CTs is {given!r}; give {what} {limits}")
    return list(values)


def _are_amounts(values: Any, count: int) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) == count
        and all(type(item) in (int, float) and 0 <= item < math.inf for item in values)
    )


class Drawn(NamedTuple):
    """A scan that was drawn.

    Attributes:
        hu: `[H, W, D]` float32.
        unseen: `[H, W, D]` bool, what the field of view leaves out, at -1024 HU; none where it holds everything.
    """

    hu: Tensor
    unseen: Tensor | None


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], spacing: Array, scale: float) -> Array:
    """Draw a random field of zero mean and unit variance that varies over `scale` mm: float32 of `shape`."""
    bases = [bumps(size, float(step), scale) for size, step in zip(shape, spacing, strict=True)]
    field = torch.from_numpy(rng.standard_normal([basis.shape[1] for basis in bases], np.float32))
    for axis, basis in enumerate(bases):
        field = along(field, basis, axis)
    return field.numpy()


def bumps(size: int, step: float, scale: float) -> Tensor:
    """Return Gaussians every `scale` mm over an axis of voxels of `step` mm, `[size, knots]`, each row of length 1."""
    knots = torch.arange(-scale, size * step + scale, scale, dtype=torch.float64)
    away = torch.arange(size, dtype=torch.float64)[:, None] * step - knots
    basis = torch.exp(-(away**2) / (1.28 * scale**2))
    return (basis / basis.norm(dim=1, keepdim=True)).float()


def along(volume: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply a volume `[H, W, D]` with a matrix `[new, old]` along an axis."""
    if axis == 0:
        return (matrix @ volume.reshape(volume.shape[0], -1)).reshape(-1, *volume.shape[1:])
    return matrix @ volume if axis == 1 else volume @ matrix.T


def gaussian(size: int, sigma: float) -> Tensor:
    """Return the matrix `[size, size]` that blurs constant voxels by a Gaussian, exact at any `sigma` in voxels."""
    edges = torch.arange(size + 1, dtype=torch.float64) - 0.5
    edges[0], edges[-1] = -torch.inf, torch.inf
    below = torch.special.ndtr((edges - torch.arange(size, dtype=torch.float64)[:, None]) / max(sigma, 1e-3))
    return below.diff(dim=1).float()


def slices(size: int, thickness: float, distance: float, first: float) -> tuple[Tensor, Tensor]:
    """Return what slices do to an axis of voxels, all lengths in voxels.

    Args:
        size: voxels of the axis.
        thickness: of a slice.
        distance: between two slices.
        first: position of the first slice, between `-distance` and 0.

    Returns:
        Linear interpolation between slices, `[size, slices]`, and the mean over each slice, `[slices, size]`.
    """
    count = int(np.ceil((size - 1 - first) / distance)) + 1
    at = first + distance * torch.arange(count, dtype=torch.float64)
    edges = torch.arange(size + 1, dtype=torch.float64) - 0.5
    edges[0], edges[-1] = -torch.inf, torch.inf
    mean = ((edges - at[:, None]) / thickness + 0.5).clamp(0, 1).diff(dim=1)
    between = (1 - (torch.arange(size, dtype=torch.float64)[:, None] - at).abs() / distance).clamp(min=0)
    return between.float(), mean.float()


def draw_scan(
    rng: np.random.Generator,
    tissue: Tensor,
    spacing: Array,
    table: TissueTable,
    variety: Variety = USUAL,
) -> Drawn:
    """Draw a scan of a tissue map: contrast, texture, reconstruction, noise and artefacts differ each time.

    Args:
        rng: source of all variation.
        tissue: `[H, W, D]` uint8, indices into the table.
        spacing: `[3]` voxel size in mm.
        table: of the tissues.
        variety: how much scans differ.

    Raises:
        InputError: an index is not in the table.
    """
    if (highest := int(tissue.max())) >= len(table.names):
        count = len(table.names)
        raise InputError(f"tissue {highest} is not in {table.source}, which has {count}, 0 to {count - 1}")
    noise_source = torch.Generator().manual_seed(int(rng.integers(2**62)))
    shape, index = tuple(tissue.shape), tissue.reshape(-1).int()

    def of_tissue(values: Array) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.float32)).index_select(0, index).view(shape)

    def noise(*size: int) -> Tensor:
        return torch.randn(size or shape, generator=noise_source)

    normal = across_slices = 2
    if rng.random() < variety.across:
        normal = across_slices = int(rng.integers(2))
    in_plane = [axis for axis in range(3) if axis != normal]

    # What the patient is made of.
    image = of_tissue(mean_hu(rng, table, variety))
    image += of_tissue(table.variation) * torch.from_numpy(
        smooth_field(rng, shape, spacing, rng.uniform(*variety.variation_mm))
    )
    grain, width = noise(), rng.uniform(*variety.texture_mm)
    for axis in range(3):
        grain = along(grain, unit_variance(gaussian(shape[axis], width / spacing[axis])), axis)
    image += of_tissue(table.texture * rng.uniform(*variety.texture)) * grain

    # What the scanner makes of it: artefacts, kernel, slices, noise.
    if image.max() > _METAL and (metal := of_tissue(table.hu.max(1)) > _METAL).any():
        image += streaks(rng, metal.numpy(), spacing, in_plane, variety.streaks)
    uneven = torch.from_numpy(smooth_field(rng, shape, spacing, 90))
    image += rng.uniform(*variety.shading) * uneven
    kernel, edge = rng.uniform(*variety.kernel_mm), rng.uniform(*variety.sharpening)
    sigma, noise_mm = log_uniform(rng, variety.noise_hu), rng.uniform(*variety.noise_mm)
    tail = rng.uniform(0, 0.4)
    thickness = log_uniform(rng, variety.slice_mm) / spacing[normal]
    distance = thickness * rng.uniform(0.6, 1)
    between, mean = slices(shape[normal], thickness, distance, -distance * rng.random())
    thick = distance > 1  # else each voxel has slices of its own, and so its own noise
    shown = list(shape)
    shown[normal] = between.shape[1] if thick else shape[normal]
    static = noise(*shown)
    for axis in in_plane:
        blur = gaussian(shape[axis], kernel / spacing[axis])
        blur += edge * (blur - gaussian(shape[axis], 2.5 * kernel / spacing[axis]))
        image = along(image, blur, axis)
        blotches = gaussian(shape[axis], 4 / spacing[axis])
        static = along(
            static,
            unit_variance((1 - tail) * gaussian(shape[axis], noise_mm / spacing[axis]) + tail * blotches),
            axis,
        )
    image = along(image, between @ mean, across_slices)
    if thick:
        static = along(static, between * (len(between) / between.square().sum()).sqrt(), normal)
    image += sigma * (1 + 0.2 * (uneven - uneven.mean())) * static
    image = image * (1 + variety.scale * rng.uniform(-1, 1)) + variety.shift * rng.uniform(-1, 1)
    image.clamp_(LOWEST, HIGHEST)
    unseen = out_of_view(rng, shape, spacing, normal, variety)
    if unseen is not None:
        image[unseen] = LOWEST
    return Drawn(image, unseen)


def mean_hu(rng: np.random.Generator, table: TissueTable, variety: Variety) -> NDArray[np.float32]:
    """Draw each tissue's mean HU in one patient: a phase between two of the table, and an offset of its own."""
    phases = np.zeros(table.hu.shape[1])
    share = rng.random()
    for phase, part in zip(rng.integers(len(phases), size=2), (share, 1 - share), strict=True):
        phases[phase] += part
    enhancement = (table.hu @ phases - table.hu[:, 0]) * (rng.random() < variety.contrast)
    factor = rng.uniform(*variety.enhancement) * rng.normal(1, 0.1, len(table.names)).clip(0.7, 1.3)
    offset = rng.standard_normal(len(table.names)).clip(-2.5, 2.5) * table.spread * variety.spread
    return (table.hu[:, 0] + enhancement * factor + offset).astype(np.float32)


def unit_variance(matrix: Tensor) -> Tensor:
    """Scale a filter's matrix so that white noise keeps its variance."""
    return matrix / matrix.norm(dim=1, keepdim=True)


def log_uniform(rng: np.random.Generator, limits: Range) -> float:
    """Draw a positive number between limits, uniform in its logarithm."""
    return float(np.exp(rng.uniform(*np.log(limits))))


def streaks(
    rng: np.random.Generator, metal: NDArray[np.bool_], spacing: Array, in_plane: list[int], strength: Range
) -> Tensor:
    """Draw bright and dark rays about metal, in the planes of the slices, weaker with distance.

    Args:
        rng: source of all variation.
        metal: `[H, W, D]`.
        spacing: `[3]` voxel size in mm.
        in_plane: the two axes of a slice.
        strength: HU at the surface of a large implant.

    Returns:
        `[H, W, D]` float32 HU to add.
    """
    normal = 3 - sum(in_plane)
    added = np.zeros(metal.shape, np.float32)
    pieces, _ = ndimage.label(metal)
    sizes = np.bincount(pieces.ravel())
    for piece in 1 + np.argsort(-sizes[1:])[:_MOST_IMPLANTS]:
        implant = np.moveaxis(pieces == piece, normal, 0)
        hu, rays = log_uniform(rng, strength), rng.standard_normal(360)
        broad = np.cos(np.linspace(0, 4 * np.pi, 360, endpoint=False) + rng.uniform(0, 2 * np.pi))
        for level in np.flatnonzero(implant.any((1, 2))):
            u, v = (
                (np.arange(size, dtype=np.float32) - place.mean()) * spacing[axis]
                for size, place, axis in zip(implant.shape[1:], np.nonzero(implant[level]), in_plane, strict=True)
            )
            distance = np.hypot(u[:, None], v)
            radius = np.sqrt(implant[level].sum() * spacing[in_plane[0]] * spacing[in_plane[1]] / np.pi)
            angle = (np.degrees(np.arctan2(v, u[:, None])) + 360).astype(np.int16) % 360
            own = ndimage.gaussian_filter1d(rays + rng.standard_normal(360), 1.5, mode="wrap")  # some 4 degrees wide
            ray = (1.6 * own + broad)[angle] * hu * min(1, radius / 8) / (1 + (distance / (2 * radius)) ** 2)
            np.moveaxis(added, normal, 0)[level] += np.where(implant[level], 0, ray)
    return torch.from_numpy(added)


def out_of_view(
    rng: np.random.Generator, shape: tuple[int, ...], spacing: Array, normal: int, variety: Variety
) -> Tensor | None:
    """Draw what a round field of view or the end of the scan leaves out, `[H, W, D]` bool; mostly nothing.

    Args:
        rng: source of all variation.
        shape: of the volume.
        spacing: `[3]` voxel size in mm.
        normal: axis across which slices lie.
        variety: for its chances.
    """
    extent = np.array(shape) * spacing
    places = [torch.from_numpy((np.arange(n) - (n - 1) / 2) * s) for n, s in zip(shape, spacing, strict=True)]
    u, v = (places[axis] for axis in range(3) if axis != normal)
    unseen = torch.zeros(shape, dtype=torch.bool)
    if rng.random() < variety.view:
        radius, angle = rng.uniform(125, 250), rng.uniform(0, 2 * np.pi)
        half = min(extent[axis] for axis in range(3) if axis != normal) / 2
        away = radius - half * rng.uniform(0.4, 1.2)  # of the circle's centre from the volume's
        disc = (u[:, None] - away * np.cos(angle)) ** 2 + (v - away * np.sin(angle)) ** 2 > radius**2
        unseen |= disc.unsqueeze(normal)
    if rng.random() < variety.end:
        level, side = extent[normal] * rng.uniform(0, 0.45), rng.choice([-1, 1])
        over = places[normal] * side > level
        unseen |= over.view([-1 if axis == normal else 1 for axis in range(3)])
    return unseen if unseen.any() else None


def scan(rng: np.random.Generator, tissue: NDArray[np.uint8], spacing: Array) -> NDArray[np.int16]:
    """Scan a phantom's tissue map `[H, W, D]` with the :data:`CLINICAL` variety; int16 HU."""
    image = draw_scan(rng, torch.from_numpy(tissue), spacing, phantom_tissues(), CLINICAL).hu
    return image.round().to(torch.int16).numpy()
