"""Many synthetic patients together: they differ as widely as those of clinics, and no more."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from shared_networks.synthetic import phantom
from shared_networks.synthetic.body import anatomy
from shared_networks.synthetic.patient import place, varied
from shared_networks.synthetic.tissues import FLARE22, ORGANS, TISSUE_ID, TISSUES

from .test_phantom import Case, make

pytestmark = pytest.mark.integration

# Of organs wholly in view, in ml: limits for every case and for the median one.
VOLUMES = {
    "liver": (400, 3000, 1150, 1800),  # the least is what a resection left
    "spleen": (35, 850, 110, 280),
    "right kidney": (20, 480, 115, 210),
    "left kidney": (20, 480, 115, 210),
    "gallbladder": (1, 140, 15, 60),
    "pancreas": (20, 190, 50, 120),
    "stomach": (25, 1400, 200, 550),
    "duodenum": (20, 210, 45, 120),
    "right adrenal gland": (1, 30, 2.5, 9),
    "left adrenal gland": (1, 30, 2.5, 9),
}

ORAL_CONTRAST = [name for name in TISSUES if name.endswith("oral contrast")]
Bodies = list[tuple[NDArray[np.float64], NDArray[np.int64]]]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [make(seed) for seed in range(16)]


def centre(case: Case, organ: str) -> NDArray[np.float64] | None:
    """World position in mm (right, anterior, superior) of an organ's centre of mass, None where it is absent."""
    _, label, affine = case
    voxels = np.argwhere(label == FLARE22.index(organ))
    return nib.affines.apply_affine(affine, voxels.mean(0)) if len(voxels) else None


def cut(label: NDArray[np.uint8], value: int) -> bool:
    """Whether an organ touches the edge of the array."""
    return any((np.take(label, end, axis) == value).any() for axis in range(3) for end in (0, -1))


def test_types_and_ranges(cases: list[Case]) -> None:
    for image, label, affine in cases:
        assert image.dtype == np.int16 and label.dtype == np.uint8 and affine.shape == (4, 4)
        assert image.shape == label.shape and image.flags.c_contiguous and label.flags.c_contiguous
        assert image.min() >= -1024 and image.max() <= 3071 and image.max() > 400
        assert label.max() <= 13


def test_geometry_varies_as_in_clinics(cases: list[Case]) -> None:
    affines = [affine for _, _, affine in cases]
    codes = {"".join(nib.aff2axcodes(affine)) for affine in affines}
    spacings = np.array([nib.affines.voxel_sizes(affine) for affine in affines])
    assert codes <= set(phantom.ORIENTATIONS) and len(codes) >= 4
    assert any(code[2] not in "SI" for code in codes), "some arrays do not end in the head-foot axis"
    assert (spacings.max(1) > 1.1 * spacings.min(1)).sum() >= 4
    assert spacings.min() > 3.4 and spacings.max() < 5.1
    oblique = [nib.affines.obliquity(affine).max() > 0.005 for affine in affines]
    assert any(oblique) and not all(oblique)
    for affine in affines:
        directions = affine[:3, :3] / nib.affines.voxel_sizes(affine)
        np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-9)


def test_organs_lie_on_their_side_of_the_patient(cases: list[Case]) -> None:
    """Along x (right), y (anterior) and, mostly, z (superior) of the world, the first organ is beyond the second."""
    pairs = (
        (0, "liver", "spleen"),
        (0, "right kidney", "left kidney"),
        (0, "right adrenal gland", "left adrenal gland"),
        (0, "inferior vena cava", "aorta"),
        (0, "gallbladder", "stomach"),
        (0, "duodenum", "aorta"),
        (1, "stomach", "spleen"),
        (1, "pancreas", "left kidney"),
        (2, "right adrenal gland", "right kidney"),
        (2, "left kidney", "right kidney"),
    )
    for axis, first, second in pairs:
        beyond = {}
        for number, case in enumerate(cases):
            here, there = centre(case, first), centre(case, second)
            whole = not any(cut(case[1], FLARE22.index(organ)) for organ in (first, second))
            if here is not None and there is not None and (axis != 2 or whole):
                beyond[number] = here[axis] > there[axis] - 5
        least = 0.7 if axis == 2 else 1  # a kidney may be low or in the pelvis
        assert np.mean(list(beyond.values())) >= least, f"{first} is not beyond {second} along axis {axis}: {beyond}"


def test_organs_are_there_but_not_always_whole(cases: list[Case]) -> None:
    present = np.array([[(label == value).any() for value in range(1, 14)] for _, label, _ in cases])
    assert (present.mean(0) > 0.6).all()
    assert not present.all(), "some organ is absent after surgery or out of view"
    liver = FLARE22.index("liver")
    cuts = [cut(label, liver) for _, label, _ in cases]
    assert any(cuts) and not all(cuts)


def test_volumes_are_those_of_adults(cases: list[Case]) -> None:
    for organ, (least, most, low, high) in VOLUMES.items():
        value = FLARE22.index(organ)
        volumes = [
            (label == value).sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
            for _, label, affine in cases
            if (label == value).any() and not cut(label, value)
        ]
        assert len(volumes) >= 5, organ
        assert least < min(volumes) and max(volumes) < most, f"{organ}: {np.round(volumes)} ml"
        assert low < np.median(volumes) < high, f"{organ}: {np.round(volumes)} ml"


def test_hounsfield_units(cases: list[Case]) -> None:
    enhancement = []
    for image, label, _ in cases:
        mean = {
            organ: np.median(image[label == value]) for value, organ in enumerate(FLARE22) if (label == value).any()
        }
        assert 5 < mean.get("liver", 50) < 140
        assert 15 < mean.get("aorta", 50) < 420
        if "gallbladder" in mean:
            assert -10 < mean["gallbladder"] < 110
        if {"aorta", "liver"} <= set(mean):
            enhancement.append(mean["aorta"] - mean["liver"])
        counts, edges = np.histogram(image, np.arange(-200, 0, 10))
        assert -120 <= edges[counts.argmax()] <= -85, "fat is the commonest of the soft tissues below water"
        corners = image[tuple(np.ix_(*[[0, -1]] * 3))]
        assert (np.abs(np.median(corners) + 1000) < 40).all(), "air surrounds the patient"
        if "liver" in mean and not cut(label, FLARE22.index("liver")):
            assert ((image > -920) & (image < -780)).mean() > 0.01, "lung"
    assert min(enhancement) < 30 and max(enhancement) > 80, "phases range from none to arterial contrast"


@pytest.fixture(scope="module")
def bodies() -> Bodies:
    """Volumes of organs in ml and, for each organ, of the tissues in it, of whole bellies."""
    result = []
    for seed in range(24):
        generator = np.random.default_rng([14, seed])
        canvas, _, affine = place(generator, 8, (-200, 175))
        for structure in varied(anatomy(generator, canvas.habitus), generator):
            canvas.paint(structure)
        bins = np.arange(len(ORGANS) + 1), np.arange(len(TISSUES) + 1)
        pairs = np.histogram2d(canvas.organ.ravel(), canvas.tissue.ravel(), bins)[0]
        result.append((pairs.sum(1) * np.linalg.det(affine[:3, :3]) / 1000, pairs))
    return result


def test_volumes_differ_as_between_adults(bodies: Bodies) -> None:
    limits = {"liver": (0.18, 0.4), "spleen": (0.3, 0.9), "left kidney": (0.2, 0.6), "stomach": (0.3, 1)}
    for organ, (low, high) in limits.items():
        volumes = np.array([volume[ORGANS.index(organ)] for volume, _ in bodies])
        volumes = volumes[volumes > 10]
        assert len(volumes) > 18, organ
        assert low < volumes.std() / volumes.mean() < high, f"{organ}: {np.round(volumes)} ml"


def test_stomach_and_bowel_hold_many_things(bodies: Bodies) -> None:
    contents = [TISSUE_ID[name] for name in ("gas", "chyme", "water", "soft chyme", "food", *ORAL_CONTRAST)]
    stomach = [pairs[ORGANS.index("stomach")][contents].argmax() for _, pairs in bodies]
    assert len(set(stomach)) >= 4
    assert np.bincount(stomach).max() <= 0.7 * len(bodies)
    seen = np.array([[pairs[0][TISSUE_ID[name]] > 20 for name in TISSUES] for _, pairs in bodies])
    names = dict(zip(TISSUES, seen.mean(0), strict=True))
    for name in ("gas", "chyme", "water", "soft chyme", "stool", "soft stool", "dense stool", "oral contrast"):
        assert names[name] > 0.05, name
    assert np.median([seen[i, contents].sum() for i in range(len(seen))]) >= 3, "several fillings in one patient"
    assert names["oral contrast"] < 0.8 and names["stool"] < 1


def test_rare_findings_turn_up(bodies: Bodies) -> None:
    amounts = np.array([pairs.sum(0) for _, pairs in bodies])
    for name in ("ascites", "calcification", "metastasis", "hypervascular mass", "lymph node", "stranding", "metal"):
        found = (amounts[:, TISSUE_ID[name]] > 0).mean()
        assert found > 0, name
    assert (amounts[:, TISSUE_ID["ascites"]] > 0).mean() < 0.4
