from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import CenterSpatialCropd, Compose, CropForegroundd, SpatialPadd

from shared_networks.errors import InputError
from shared_networks.store.crops import RandReadCropsd, ReadCentralCropd
from shared_networks.store.format import (
    append_entry,
    centres_file,
    check_prepared,
    manifest_entries,
    read_manifest,
    read_volume,
    volume_bytes,
    volume_file,
    write_array,
    write_manifest,
    write_volume,
)
from shared_networks.training.sampler import SeededCacheDataset, SeededSampler

SHAPE = (2, 37, 21, 70)  # no multiple of a block
SIZE = (16, 16, 16)
PLAIN = {"flip_prob": 0, "rotate_prob": 0, "scale_prob": 0, "shift_prob": 0}


def image(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).random(shape, np.float32)


def add_case(root: Path, case: str = "set/a", shape: tuple[int, ...] = SHAPE, **settings: object) -> dict:
    file = volume_file(root, case)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_volume(file, image(shape))
    random = np.random.default_rng(1)
    inside, outside = np.array(shape[1:]) // 2, np.array(shape[1:])
    centres = np.stack([random.integers(0, inside, (64, 3)), random.integers(inside, outside, (64, 3))])
    write_array(centres_file(file), centres.astype(np.int16))
    settings = {"modality": "CT", "spacing": [1.5] * 3, "intensity_range": [-175.0, 250.0], **settings}
    append_entry(root, {"id": case, "shape": list(shape), "centres": 64, "settings": settings})
    [item] = [item for item in read_manifest(root) if item["case"] == case]
    return item


@pytest.fixture(params=["preadv", "lseek"], autouse=True)
def reading(request, monkeypatch):
    """Windows has no preadv, and neither call for the disk ahead of time."""
    if request.param == "lseek":
        for name in ("preadv", "posix_fadvise"):
            monkeypatch.delattr(os, name, raising=False)
    elif not hasattr(os, "preadv"):
        pytest.skip("this system has no preadv")


@pytest.mark.parametrize("shape", [SHAPE, (1, 8, 8, 32), (1, 1, 1, 1)])
def test_a_volume_comes_back_to_half_a_step(tmp_path, shape):
    file = tmp_path / "a.npy"
    write_volume(file, image(shape))
    assert np.abs(read_volume(file, shape) - image(shape)).max() <= 0.51 / 65535
    assert file.stat().st_size == volume_bytes(shape)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_files_are_plain_npy_and_blocks_are_pages(tmp_path):
    file = tmp_path / "a.npy"
    write_volume(file, image())
    blocks = np.load(file, mmap_mode="r")
    assert (blocks.shape, blocks.dtype, blocks.offset) == ((2, 5, 3, 3, 8, 8, 32), np.uint16, 4096)
    assert blocks[0, 0, 0, 0].nbytes == 4096
    np.testing.assert_array_equal(blocks[1, 3, 1, 2, 4, 5, 3], np.rint(image()[1, 28, 13, 67] * np.float32(65535)))


def test_crops_are_the_slices_of_the_volume_under_their_draws(tmp_path):
    item = add_case(tmp_path)
    volume = read_volume(item["image"], SHAPE)
    read = RandReadCropsd("image", SIZE, 200, scale_prob=0.3, shift_prob=0.3).set_random_state(0)
    out = read(item)
    assert len(out) == len(read.crops) == 200
    for got, crop in zip(out, read.crops, strict=True):
        box = tuple(slice(start, start + size) for start, size in zip(crop.start, SIZE, strict=True))
        expected = volume[(slice(None), *box)]
        expected = np.flip(expected, [axis + 1 for axis in range(3) if crop.flips[axis]])
        expected = np.rot90(expected, crop.turns, (1, 2)) * crop.factor + crop.offset
        assert set(got) == {"image", "case"} and got["case"] == "set/a"
        assert (got["image"].dtype, got["image"].shape) == (torch.float32, (2, *SIZE))
        np.testing.assert_allclose(got["image"], expected, atol=1e-6)
    draws = np.array([[*crop.flips, crop.turns > 0, crop.factor != 1, crop.offset != 0] for crop in read.crops]).mean(0)
    np.testing.assert_allclose(draws, [0.5, 0.5, 0.5, 0.3, 0.3, 0.3], atol=0.1)
    assert {crop.turns for crop in read.crops} == {0, 1, 2, 3}
    assert all(0.9 <= crop.factor <= 1.1 and abs(crop.offset) <= 0.1 for crop in read.crops)


def test_share_of_crops_on_foreground_and_their_places(tmp_path):
    shape = (1, 80, 80, 80)
    item = add_case(tmp_path, shape=shape)
    read = RandReadCropsd("image", (8, 8, 8), 2000, pos=6, neg=2, **PLAIN).set_random_state(3)
    read.randomize((np.load(centres_file(item["image"])), shape))
    starts = np.array([crop.start for crop in read.crops])
    assert (starts >= 0).all() and (starts <= 72).all()
    assert ((starts + 4 < 40).all(1)).mean() == pytest.approx(0.75, abs=0.04)  # foreground is in the low octant here
    for pos, neg in ((1, 0), (0, 1)):
        only = RandReadCropsd("image", (8, 8, 8), 50, pos=pos, neg=neg).set_random_state(0)
        only.randomize((np.load(centres_file(item["image"])), shape))
        assert all((np.array(crop.start) + 4 < 40).all() == bool(pos) for crop in only.crops)
    with pytest.raises(InputError, match="pos and neg are 0 and 0"):
        RandReadCropsd("image", SIZE, pos=0, neg=0)


def test_a_volume_smaller_than_the_crop_is_padded_as_monai_does(tmp_path):
    shape = (1, 9, 40, 11)
    item = add_case(tmp_path, shape=shape)
    volume = torch.as_tensor(read_volume(item["image"], shape))
    [got] = RandReadCropsd("image", SIZE, 1, **PLAIN).set_random_state(0)(item)
    padded = SpatialPadd("image", SIZE)({"image": volume})["image"]
    assert any(torch.equal(got["image"], padded[:, :, w : w + 16]) for w in range(25))


def test_crops_that_are_no_cubes_keep_their_shape(tmp_path):
    read = RandReadCropsd("image", (24, 12, 40), 40, rotate_prob=1.0).set_random_state(0)
    assert {tuple(out["image"].shape) for out in read(add_case(tmp_path))} == {(2, 24, 12, 40)}
    assert {crop.turns for crop in read.crops} == {2}


@pytest.mark.parametrize("shape", [SHAPE, (1, 9, 40, 11)])
def test_central_crop_is_that_of_the_published_chain(tmp_path, shape):
    item = add_case(tmp_path, shape=shape)
    got = ReadCentralCropd("image", SIZE)(item)
    crop = CropForegroundd("image", source_key="image", allow_smaller=True)
    chain = Compose([crop, SpatialPadd("image", SIZE), CenterSpatialCropd("image", SIZE)])
    expected = chain({"image": torch.as_tensor(read_volume(item["image"], shape))})["image"]
    assert got["case"] == "set/a"
    np.testing.assert_array_equal(got["image"], expected)


def test_no_two_draws_repeat_over_epochs_ranks_and_places(tmp_path):
    add_case(tmp_path)
    add_case(tmp_path, "set/b")
    data = SeededCacheDataset(read_manifest(tmp_path), RandReadCropsd("image", SIZE, 2, scale_prob=1.0), 0.0)
    seen, again = [], []
    for store in (seen, again):
        for rank in range(2):
            sampler = SeededSampler(data, num_replicas=2, rank=rank, seed=5)
            for epoch in range(6):
                sampler.set_epoch(epoch)
                store += [out["image"].numpy().tobytes() for draw in sampler for out in data[draw]]
    assert len(set(seen)) == len(seen) == 2 * 6 * 2
    assert seen == again


def test_manifest_survives_a_crash_in_the_middle_of_a_line(tmp_path):
    add_case(tmp_path, "set/a")
    add_case(tmp_path, "set/b")
    file = tmp_path / "manifest.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert list(manifest_entries(tmp_path)) == ["set/a"]
    append_entry(tmp_path, {"id": "set/c"})
    assert list(manifest_entries(tmp_path)) == ["set/a", "set/c"]
    append_entry(tmp_path, {"id": "set/a", "later": 1})
    assert manifest_entries(tmp_path)["set/a"]["later"] == 1
    write_manifest(tmp_path, {"b": {"id": "b"}, "a": {"id": "a"}})
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["a", "b"]
    file.write_text("nonsense\n" + file.read_text())
    with pytest.raises(InputError, match=r"manifest\.jsonl: line 1 is no entry"):
        manifest_entries(tmp_path)


@pytest.mark.parametrize("case", ["../victim", "set/../../victim", "/victim", "", ".", 7])
def test_an_id_that_leads_out_of_the_store_is_refused(tmp_path, case):
    """A store may come from somebody else; `exclude` removes files of cases."""
    add_case(tmp_path / "store", "set/a")
    append_entry(tmp_path / "store", {"id": case})
    with pytest.raises(InputError, match=rf"line 2: the id {case!r} leads out of the store"):
        manifest_entries(tmp_path / "store")


def test_cases_have_the_digests_of_the_scans_that_they_were_made_of(tmp_path):
    """So that a training which is resumed knows whether the same scans validate."""
    assert add_case(tmp_path)["sha256"] == ""  # an entry without
    append_entry(tmp_path, {**manifest_entries(tmp_path)["set/a"], "sha256": "1f"})
    assert [item["sha256"] for item in read_manifest(tmp_path)] == ["1f"]


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(InputError, match="prepared_dir is not set; pass --prepared_dir"):
        read_manifest("")
    with pytest.raises(InputError, match=r"no prepared case; make some: python -m monai\.bundle run"):
        read_manifest(tmp_path)
    item = add_case(tmp_path)
    file = Path(item["image"])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"files of 1 of 1 cases are missing or cut short \(set/a\)"):
        read_manifest(tmp_path)
    with pytest.raises(InputError, match=r"bytes are not \d+; prepare again"):
        ReadCentralCropd("image", SIZE)(item)
    file.unlink()
    with pytest.raises(InputError, match=r"a\.npy: no such file; prepare again"):
        RandReadCropsd("image", SIZE)(item)


@pytest.mark.parametrize("lack", [{"shape": None}, {"shape": [1]}, {"shape": "abc"}, {"centres": None}])
def test_an_entry_that_is_not_whole_is_prepared_again(tmp_path, lack):
    add_case(tmp_path)
    append_entry(tmp_path, {**manifest_entries(tmp_path)["set/a"], **lack})
    with pytest.raises(InputError, match=r"files of 1 of 1 cases are missing or cut short \(set/a\)"):
        read_manifest(tmp_path)


class Shortened(RandReadCropsd):
    """Another program cuts the file after it was opened and before its voxels are read."""

    length = 0

    def randomize(self, data):
        super().randomize(data)
        os.truncate(self.file, self.length)


@pytest.mark.parametrize("pages", [1, 1.5, 20.3, 89.9])
def test_a_file_that_is_cut_while_it_is_read_is_named_and_never_a_crop(tmp_path, pages):
    item = add_case(tmp_path)
    whole = Path(item["image"]).read_bytes()
    read = Shortened("image", (37, 21, 70), 1).set_random_state(0)
    read.file, read.length = item["image"], int(4096 * pages)
    with pytest.raises(InputError, match=rf"{item['image']}: ends at byte {read.length}, \d+ short: it was cut"):
        read(item)
    Path(item["image"]).write_bytes(whole)
    read.length = len(whole)
    assert len(read(item)) == 1


@pytest.mark.parametrize("left", [0, 100, 4096, 4096 + 12 * 32, 4096 + 12 * 64 - 1])
def test_centres_that_are_cut_short_are_named(tmp_path, left):
    item = add_case(tmp_path)
    os.truncate(file := centres_file(item["image"]), left)
    with pytest.raises(InputError, match=rf"{file}: is damaged or cut short; remove it and prepare again"):
        RandReadCropsd("image", SIZE)(item)


def test_files_that_cannot_be_read_are_named(tmp_path):
    item = add_case(tmp_path)
    centres = centres_file(item["image"])
    centres.unlink()
    with pytest.raises(InputError, match=rf"{centres}: no such file; prepare again"):
        RandReadCropsd("image", SIZE)(item)
    centres.mkdir()
    with pytest.raises(InputError, match=rf"{centres}: cannot be read \(Is a directory\)"):
        RandReadCropsd("image", SIZE)(item)


def test_settings_of_store_and_training_must_agree(tmp_path):
    add_case(tmp_path)
    check_prepared(tmp_path, (1.5, 1.5, 1.5), (-175, 250))
    with pytest.raises(
        InputError,
        match=r"set/a was prepared with spacing \[1.5, 1.5, 1.5\], training has \[4.0, 4.0, 4.0\]; prepare another "
        r"store with --spacing '\[4.0, 4.0, 4.0\]', or train with --spacing '\[1.5, 1.5, 1.5\]'$",
    ):
        check_prepared(tmp_path, [4.0] * 3, [-175, 250])
    with pytest.raises(
        InputError, match=r"prepared with intensity_range \[-175.0, 250.0\], training has \[-100, 250\]"
    ):
        check_prepared(tmp_path, [1.5] * 3, [-100, 250])


def test_channels_of_store_and_network_must_agree(tmp_path):
    add_case(tmp_path, shape=(1, 9, 10, 33))
    check_prepared(tmp_path, [1.5] * 3, in_channels=1)
    with pytest.raises(InputError, match=r"set/a has 1 channel.*pass --network_def#in_channels 1"):
        check_prepared(tmp_path, [1.5] * 3, in_channels=2)
    add_case(tmp_path, "set/b", shape=(2, 9, 10, 33))
    with pytest.raises(InputError, match="several numbers of channels, set/a has 1, set/b has 2; prepare a store for"):
        check_prepared(tmp_path, [1.5] * 3, in_channels=1)


def test_mr_has_no_window_to_agree_on(tmp_path):
    add_case(tmp_path, modality="MR")
    check_prepared(tmp_path, [1.5] * 3, [-100, 250])
