"""Synthetic abdominal CT with organ labels: data to start from for those who have none.

A randomly scaled, posed and warped patient is painted from the table of `anatomy`; the table of tissues gives
Hounsfield units for a contrast phase; texture, blur and noise make a scan of it. No patient is in it.

Example:
    python -m shared_networks.synthetic.phantom --out phantoms --label_set btcv --train 16 --test 4 --seed 0
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from shared_networks.errors import report_in_one_line
from shared_networks.files import atomic_write, write_json
from shared_networks.settings.command_line import call_with_options
from shared_networks.settings.kinds import NOT_NEGATIVE, PATH, SEED, choice, number
from shared_networks.synthetic.anatomy import (
    ABSENT,
    LABEL_SETS,
    ORGANS,
    TISSUE_ID,
    TISSUES,
    Array,
    Shape,
    Structure,
    anatomy,
    label_names,
)

Box = tuple[slice, ...]

ORIENTATIONS = ("RAS", "LPS", "LAS", "RPS", "LPI", "PIR", "ASL")
FAR = 1e3  # mm; a distance that is not worth computing
OPTIONS = {
    "out": PATH,
    "label_set": choice(*LABEL_SETS),
    "train": NOT_NEGATIVE,
    "test": NOT_NEGATIVE,
    "seed": SEED,
    "voxel_mm": number("a size from 0.4 to 6 mm", lambda size: 0.4 <= size <= 6),
}
"""What the options of the command line take."""


def pieces(shape: Shape) -> Array:
    """Return the straight pieces of a shape's path, `[n, 2, 4]`; an ellipsoid has one, of no length."""
    path = shape.path if len(shape.path) > 1 else shape.path[[0, 0]]
    return np.stack([path[:-1], path[1:]], 1)


def axes(shape: Shape) -> Array:
    """Return the directions of a shape's own axes as the columns of a matrix."""
    return Rotation.from_euler("xyz", shape.turn, degrees=True).as_matrix().astype(np.float32)


def bounds(shape: Shape, piece: Array, margin: float) -> Array:
    """Return the lowest and highest corner, `[2, 3]` in mm, around a piece of a shape and `margin` mm more."""
    reach = np.linalg.norm(axes(shape) * shape.flat, axis=1) * piece[:, 3:] + margin
    return np.stack([(piece[:, :3] - reach).min(0), (piece[:, :3] + reach).max(0)])


def distance(shape: Shape, piece: Array, points: Array) -> Array:
    """Return the distance in mm from the surface of a piece of a shape, negative inside, exact to first order.

    Args:
        shape: The shape, for its flattening and turn.
        piece: `[2, 4]` ends of the piece.
        points: `[3, ...]` positions in mm.
    """
    flat = np.array(shape.flat, np.float32)
    to_round = (axes(shape) / flat).T
    start, step = to_round @ piece[0, :3], to_round @ (piece[1, :3] - piece[0, :3])
    away = np.tensordot(to_round, points, 1) - start.reshape(3, 1, 1, 1)
    along = np.clip(np.tensordot(step, away, 1) / max(float(step @ step), 1e-6), 0, 1)
    away -= step.reshape(3, 1, 1, 1) * along
    length = np.linalg.norm(away, axis=0) + 1e-6
    slope = np.linalg.norm(away / flat.reshape(3, 1, 1, 1), axis=0) / length + 1e-6
    return (length - piece[0, 3] - (piece[1, 3] - piece[0, 3]) * along) / slope


def melt(first: Array, second: Array, width: float) -> Array:
    """Smooth minimum of two distances; the plain one where they differ by more than `width` mm."""
    return np.minimum(first, second) - np.maximum(width - np.abs(first - second), 0) ** 2 / (4 * width + 1e-6)


class Canvas:
    """A patient on a voxel grid: where in the body each voxel lies, its tissue and its organ.

    Args:
        points: `[3, H, W, D]` positions in patient mm; axis i of the grid runs along coordinate i, up to small angles.
    """

    def __init__(self, points: Array) -> None:
        self.points = points
        self.tissue = np.zeros(points.shape[1:], np.uint8)
        self.organ = np.zeros(points.shape[1:], np.uint8)
        across = ((1, 2), (0, 2), (0, 1))
        self.low, self.high = ([f(p, a) for p, a in zip(points, across, strict=True)] for f in (np.min, np.max))

    def box(self, corners: Array) -> Box:
        """Return the voxels that may lie between two corners, `[2, 3]` in mm; empty slices where there are none."""
        found = [
            np.flatnonzero((top >= low) & (bottom <= high))
            for bottom, top, low, high in zip(self.low, self.high, *corners, strict=True)
        ]
        return tuple(slice(f[0], f[-1] + 1) if f.size else slice(0, 0) for f in found)

    def distance(self, shapes: Iterable[Shape], box: Box, blend: float, margin: float) -> Array:
        """Return the distance in mm from the melted union of shapes over a box; `FAR` beyond `margin`."""
        union = np.full(self.tissue[box].shape, FAR, np.float32)
        for shape in shapes:
            single = np.full_like(union, FAR)
            for piece in pieces(shape):
                near = tuple(
                    slice(max(a.start, b.start), max(min(a.stop, b.stop), a.start, b.start))
                    for a, b in zip(self.box(bounds(shape, piece, margin)), box, strict=True)
                )
                part = single[tuple(slice(n.start - b.start, n.stop - b.start) for n, b in zip(near, box, strict=True))]
                if part.size:
                    np.minimum(part, distance(shape, piece, self.points[(slice(None), *near)]), out=part)
            union = melt(union, single, blend)
        return union

    def paint_trunk(self, fat: float, wall: float, belly: float) -> None:
        """Paint table, skin, fat, muscle wall, ribs, lungs and diaphragm, and leave the belly full of fat.

        Args:
            fat: Thickness of the subcutaneous fat in mm.
            wall: Thickness of the muscle wall at the flanks in mm.
            belly: How far the belly bulges forward in mm.
        """
        x, y, z = self.points[0], self.points[1] - 38, self.points[2]
        radius = np.hypot(x, y) + 1e-3
        width = 141 + 9 * np.cos((z - 40) / 60) - 0.15 * np.maximum(z - 120, 0)
        front = 98 + (y > 0) * belly * np.exp(-(((z + 30) / 110) ** 2))
        core = radius * (1 - (np.abs(x / width) ** 2.3 + np.abs(y / front) ** 2.3 + 1e-6) ** (-1 / 2.3))
        skin = core - fat * (1 + 0.35 * np.abs(x) / radius - 0.25 * y / radius)
        linea_alba = 0.6 * np.exp(-((x / 6) ** 2)) * (y > 0) * np.clip((80 - z) / 40, 0, 1)
        lining = core + wall * (0.7 + 0.4 * np.abs(x) / radius - linea_alba)

        dome = np.full_like(core, FAR)
        for cx, cy, rx, ry, top in ((62, 4, 76, 108, 122), (-62, 4, 76, 108, 106), (0, 24, 62, 98, 94)):
            level = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + (np.maximum(z, 0) / top) ** 2)
            dome = melt(dome, 70 * (level - 1), 12)
        dome[z < 0] = -FAR

        turn = np.arctan2(np.abs(x), -y)  # from the spine, 0, round the flank to the sternum, pi
        rib = (np.abs(core + 6) < 4 + 0.5 * np.cos(3 * turn)) & (np.mod(z + 26 * turn, 29) < 11)
        rib &= (z > 70 * turn - 85) & (turn > 0.35) & (turn < 2.75)
        for name, where in (
            ("table", np.abs(y + 105 + 1.25 * fat - x * x / 1500) < 2),
            ("skin", skin < 0),
            ("fat", skin < -2.5),
            ("muscle", core < 0),
            ("cortical bone", rib),
            ("trabecular bone", rib & (np.abs(core + 6) < 2)),
            ("cartilage", rib & (turn > 1.95)),
            ("lung", lining < 0),
            ("muscle", (lining < 0) & (dome < 3)),
            ("fat", (lining < 0) & (dome < 0)),
        ):
            self.tissue[where] = TISSUE_ID[name]
        self.roof = np.maximum(lining, dome)

    def paint(self, structure: Structure) -> None:
        """Paint a structure over what is there."""
        margin = max(structure.halo, structure.blend)
        corners = np.stack([bounds(s, p, margin) for s in structure.shapes for p in pieces(s)])
        box = self.box(np.stack([corners[:, 0].min(0), corners[:, 1].max(0)]))
        tissue, organ, roof = self.tissue[box], self.organ[box], self.roof[box]
        outside = self.distance(structure.shapes, box, structure.blend, margin)
        if structure.carve:
            outside = -melt(-outside, self.distance(structure.carve, box, structure.blend, 30), structure.blend)
        if structure.inside:
            outside = np.maximum(outside, roof + 0.5)
        if structure.within:
            outside[organ != ORGANS.index(structure.within)] = FAR
        around = (outside < structure.halo) & (roof < -1)
        if structure.halo:
            tissue[around], organ[around] = TISSUE_ID["fat"], 0
        if structure.organ or not structure.within:
            organ[outside < 0] = ORGANS.index(structure.organ or "background")
        for depth, name in ((0, structure.tissue), *structure.layers):
            tissue[outside < -depth] = TISSUE_ID[name]
        lumen = outside < -structure.layers[-1][0] if structure.gas else np.zeros(0, bool)
        if lumen.any():
            height = self.points[1][box]
            front, back = height[lumen].max(), height[lumen].min()
            tissue[lumen & (height > front - structure.gas * (front - back))] = TISSUE_ID["gas"]


def varied(structures: Iterable[Structure], rng: np.random.Generator) -> list[Structure]:
    """Resize and move each organ a little, with what lies within it; some are gone after surgery."""
    grow = {organ: rng.normal(1, 0.035) for organ in ORGANS[1:]}
    move = {organ: rng.normal(0, (1.5, 1.5, 1.5, 0)) for organ in ORGANS[1:]}
    gone = [organ for organ, chance in ABSENT.items() if rng.random() < chance]
    result = []
    for structure in structures:
        organ = structure.within or structure.organ
        if organ in grow:
            paths = [(s.path * (1, 1, 1, grow[organ]) + move[organ]).astype(np.float32) for s in structure.shapes]
            shapes = [s._replace(path=path) for s, path in zip(structure.shapes, paths, strict=True)]
            structure = structure._replace(shapes=tuple(shapes))
        if structure.shapes and organ not in gone:
            result.append(structure)
    return result


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], spacing: Array, scale: float) -> Array:
    """Draw a random field of zero mean and unit variance that varies over `scale` mm: float32 of `shape`."""
    bases = []
    for size, step in zip(shape, spacing, strict=True):
        knots = np.arange(-scale, size * step + scale, scale)
        basis = np.exp(-((np.arange(size)[:, None] * step - knots) ** 2) / (1.28 * scale**2))
        bases.append((basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32))
    field = rng.standard_normal([basis.shape[1] for basis in bases], np.float32)
    for basis in bases:
        field = np.tensordot(field, basis, (0, 1))
    return field


def grain(rng: np.random.Generator, shape: tuple[int, ...], sigma: Array) -> Array:
    """Draw white noise smoothed by a Gaussian of `sigma` voxels an axis, at unit variance: float32 of `shape`."""
    field = gaussian_filter(rng.standard_normal(shape, np.float32), sigma, truncate=3)
    return field / field.std()


def scan(rng: np.random.Generator, tissue: NDArray[np.uint8], spacing: Array) -> NDArray[np.int16]:
    """Scan a tissue map: a contrast phase between any two of the table, texture, blur and noise; int16 HU."""
    table = np.array(list(TISSUES.values()), np.float32)
    phase = np.maximum(0, 1 - np.abs(np.arange(4) - rng.uniform(0, 3)))
    enhancement = table[:, :4] @ phase - table[:, 0]
    mean = table[:, 0] + enhancement * rng.uniform(0.8, 1.2) + rng.normal(0, 4, len(table)) * (table[:, 4] > 0)
    mean[TISSUE_ID["liver"]] -= 35 * rng.beta(1, 4)  # steatosis
    image = mean.astype(np.float32)[tissue] + table[:, 4][tissue] * grain(rng, tissue.shape, 2.2 / spacing)
    image = gaussian_filter(image, np.hypot(0.4, rng.uniform(0.4, 0.9) / spacing), truncate=3)
    image += rng.uniform(5, 22) * grain(rng, tissue.shape, np.array([1, 1, 0.4]) * rng.uniform(0.3, 0.8))
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def place(rng: np.random.Generator, voxel_mm: float) -> tuple[Canvas, Array, Array]:
    """Lay a patient with painted trunk on a scanner's grid, RAS up to a slight tilt.

    Returns:
        The canvas, the spacing `[3]` in mm and the affine `[4, 4]` from voxels to world mm.
    """
    in_plane = voxel_mm * rng.uniform(0.88, 1.12)
    spacing = np.array([in_plane, in_plane, max(in_plane, rng.uniform(voxel_mm, max(voxel_mm, 5)))])
    habitus = rng.beta(1.6, 2.2)  # 0 is thin, 1 obese
    scale = rng.normal(1, 0.02) * np.array([0.97 + 0.08 * habitus, 0.97 + 0.08 * habitus, rng.normal(1, 0.02)])
    fat, belly = 5 + 38 * habitus**1.6, 30 * habitus
    bottom = rng.uniform(-60, -10) if rng.random() < 0.12 else rng.uniform(-200, -120)
    top = rng.uniform(40, 90) if rng.random() < 0.12 else rng.uniform(125, 175)
    extent = np.array([300, 196 + belly, top - bottom]) * scale + np.array([2.4 * fat + 30, 2.4 * fat + 50, 0])
    shape = tuple(int(n) for n in np.ceil(extent / spacing))

    affine, tilt = np.eye(4), rng.normal(0, 3, 3) * (rng.random() < 0.3)
    affine[:3, :3] = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix() * spacing
    centre = np.array([0, 32 + belly / 2, (bottom + top) / 2]) * scale + rng.normal(0, 4, 3)
    affine[:3, 3] = centre - affine[:3, :3] @ (np.array(shape) - 1) / 2
    pose = Rotation.from_euler("xyz", rng.normal(0, (2, 2.5, 2.5)), degrees=True).as_matrix() * scale
    to_body = (np.linalg.inv(pose) @ affine[:3]).astype(np.float32)
    points = np.empty((3, *shape), np.float32)
    for point, row in zip(points, to_body, strict=True):
        i, j, k = np.ogrid[tuple(map(slice, shape))]
        point[...] = row[0] * i + row[1] * j + row[2] * k + row[3]
        point += rng.uniform(3, 5) * smooth_field(rng, shape, spacing, 75)
        point += rng.uniform(0.9, 1.6) * smooth_field(rng, shape, spacing, 24)
    canvas = Canvas(points)
    canvas.paint_trunk(fat, rng.uniform(10, 15), belly)
    affine[:3, 3] += rng.uniform(-300, 300, 3)  # the scanner's origin is anywhere
    return canvas, spacing, affine


def phantom_case(
    rng: np.random.Generator, label_set: str = "btcv", voxel_mm: float = 3.0
) -> tuple[NDArray[np.int16], NDArray[np.uint8], Array]:
    """Make one scan. The same generator state gives the same patient and scan in either label set.

    Args:
        rng: Source of all variation.
        label_set: Order of the label values, "btcv" or "flare".
        voxel_mm: In-plane voxel size in mm, up to 12 % more or less; slices are as thick or up to 5 mm.

    Returns:
        Image `[H, W, D]` in HU within [-1024, 3071], label `[H, W, D]` and their affine `[4, 4]` to RAS world mm. The
        axes of the arrays run in one of `ORIENTATIONS`.

    Raises:
        ValueError: If `label_set` is unknown or `voxel_mm` is not from 0.4 to 6.
    """
    names = label_names(label_set)
    if not 0.4 <= voxel_mm <= 6:
        raise ValueError(f"voxel_mm is {voxel_mm}; choose a size from 0.4 to 6 mm")
    canvas, spacing, affine = place(rng, voxel_mm)
    for structure in varied(anatomy(rng), rng):
        canvas.paint(structure)
    values = np.array([names.index(organ) if organ in names else 0 for organ in ORGANS], np.uint8)
    volumes = scan(rng, canvas.tissue, spacing), values[canvas.organ]
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(rng.choice(ORIENTATIONS)))
    image, label = (np.ascontiguousarray(apply_orientation(volume, turn)) for volume in volumes)
    return image, label, affine @ inv_ornt_aff(turn, canvas.tissue.shape)


def write_dataset(
    out: str | Path, label_set: str = "btcv", train: int = 16, test: int = 4, seed: int = 0, voxel_mm: float = 3.0
) -> None:
    """Write phantoms as an nnU-Net folder: imagesTr, labelsTr, imagesTs, labelsTs and, last, dataset.json.

    Each case depends on the seed, its split and its number only, not on how many are made.

    Args:
        out: Folder to write to; made if missing, files of the same names are replaced.
        label_set: Order of the label values, "btcv" or "flare".
        train: Number of training cases, `train_000` and on.
        test: Number of test cases, `test_000` and on.
        seed: Seed of the whole set.
        voxel_mm: In-plane voxel size: 3 makes a case in about half a second, 0.8 is clinical resolution.

    Raises:
        ValueError: As `phantom_case`.
        FileExistsError: If the folder already holds other scans.
    """
    folder, names = Path(out), label_names(label_set)
    planned = {
        (split, i): (folder / f"images{end}/{name}_{i:03d}_0000.nii.gz", folder / f"labels{end}/{name}_{i:03d}.nii.gz")
        for split, (name, end, count) in enumerate((("train", "Tr", train), ("test", "Ts", test)))
        for i in range(count)
    }
    others = set(folder.glob("*T[rs]/*.nii.gz")) - {path for paths in planned.values() for path in paths}
    if others:
        raise FileExistsError(f"{folder} already holds other scans, such as {min(others)}; choose an empty folder")
    for kind in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for (split, index), paths in tqdm(planned.items(), desc="phantoms", unit="case"):
        image, label, affine = phantom_case(np.random.default_rng([seed, split, index]), label_set, voxel_mm)
        for path, volume in zip(paths, (image, label), strict=True):
            with atomic_write(path, "give another --out") as unfinished:
                unfinished.write_bytes(gzip.compress(nib.Nifti1Image(volume, affine).to_bytes(), 1, mtime=0))
    summary = {
        "name": folder.resolve().name,
        "channel_names": {"0": "CT"},
        "labels": {name: value for value, name in enumerate(names)},
        "numTraining": train,
        "file_ending": ".nii.gz",
    }
    write_json(folder / "dataset.json", summary, "give another --out")


if __name__ == "__main__":
    report_in_one_line()
    call_with_options(write_dataset, OPTIONS, sys.argv[1:])
