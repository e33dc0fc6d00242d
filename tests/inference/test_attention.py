from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from monai.networks.utils import eval_mode
from nibabel.affines import apply_affine, from_matvec
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from torch import nn

from shared_networks.datasets.pairs import case_name
from shared_networks.datasets.scans import BadScanError, Source, read_scan
from shared_networks.errors import InputError, input_error_in
from shared_networks.figures.attention import attention_figure
from shared_networks.figures.planes import orthogonal_planes
from shared_networks.inference.attention import (
    QueryAttention,
    QueryVoxel,
    QueryWindowd,
    organ_voxel,
    query_last,
    to_scan_grid,
)
from shared_networks.inference.features import token_affine
from shared_networks.inference.predict import scan_stamp
from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.networks.vit import attention_maps
from tests.conftest import ROOT

pytestmark = pytest.mark.integration

BUNDLE = ROOT / "hi_end_mae_pretrain"
MAPS = [f"{kind}_block_{feature}" for kind in ("encoder", "cross") for feature in (3, 6, 9)]
SHAPE, ZOOMS = (20, 31, 17), (2.0, 3.0, 5.0)  # in RAS


def affine_of(axcodes: str) -> np.ndarray:
    to_axes = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axcodes))
    return from_matvec(np.diag(ZOOMS), (-30, 20, 5)) @ inv_ornt_aff(to_axes, SHAPE)


def shape_of(axcodes: str) -> tuple[int, ...]:
    size = dict(zip("RAS", SHAPE, strict=True)) | dict(zip("LPI", SHAPE, strict=True))
    return tuple(size[code] for code in axcodes)


def save(values: np.ndarray, affine: np.ndarray, file: Path) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), file)
    return str(file)


def workflow(**settings: Any) -> ConfigWorkflow:
    files = [str(BUNDLE / "configs" / f"{name}.json") for name in ("inference", "attention", "tiny")]
    return ConfigWorkflow(files, workflow_type="infer", logging_file=False, bundle_root=str(BUNDLE), **settings)


def complaint(**settings: Any) -> str:
    with pytest.raises((RuntimeError, InputError)) as error:
        workflow(**settings).initialize()
    return str(input_error_in(error.value))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the tiny network, large enough for attention that differs."""
    torch.manual_seed(0)
    network = workflow(dataset_dir="").parser.get_parsed_content("network_def")
    file = tmp_path_factory.mktemp("models") / "model.pt"
    torch.save({name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in network.state_dict().items()}, file)
    return file


def tiny_mae() -> HiEndMAE:
    torch.manual_seed(1)
    network = HiEndMAE(
        img_size=(8, 8, 12),
        patch_size=4,  # grid (2, 2, 3)
        hidden_size=24,
        num_layers=4,
        num_heads=3,
        decoder_hidden_size=12,
        decoder_num_heads=2,
        out_indices=(0, 1, 3),
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network.eval()


def test_voxel_of_a_curved_organ_lies_in_it() -> None:
    organ = np.zeros((9, 9, 5), dtype=bool)
    organ[1:8, 1:8, 1:4] = True
    organ[2:8, 2:7, :] = False  # a bracket, open at the end of the first axis
    assert organ[organ_voxel(organ, (1, 1, 1))]
    block = np.zeros((9, 9, 9), dtype=bool)
    block[2:5, 4:7, 6:9] = True
    assert organ_voxel(block, (1.0, 2.0, 5.0)) == (3, 5, 7)


def test_closest_is_meant_in_millimetres() -> None:
    organ = np.zeros((9, 9, 1), dtype=bool)
    organ[[0, 8], 4] = organ[4, [1, 7]] = True  # the centroid is (4, 4)
    assert organ_voxel(organ, (1, 1, 1)) == (4, 1, 0)
    assert organ_voxel(organ, (1, 2, 1)) == (0, 4, 0)


def sources(*files: str) -> list[Source]:
    return [Source(case_name(file), (file,)) for file in files]


def test_exactly_one_of_voxel_and_label() -> None:
    for voxel, label in ((None, None), ([1, 2, 3], 6)):
        with pytest.raises(InputError) as error:
            QueryVoxel(sources("a.nii"), "data", "imagesTs", voxel, label)
        assert str(error.value).startswith(f"voxel is {voxel} and label is {label}: give exactly one, --voxel")
    for wrong in ([1, 2], [1, 2, 3.5], 4, "here"):
        with pytest.raises(InputError) as error:
            QueryVoxel(sources("a.nii"), "data", "imagesTs", wrong)  # type: ignore[arg-type]
        assert str(error.value) == f'voxel is {wrong}: give three integers, --voxel "[i,j,k]"'


def test_labels_come_from_the_folder_named_alike(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=SHAPE)
    images = [save(values, np.eye(4), tmp_path / "imagesTr" / f"ct_{n}_0000.nii.gz") for n in (1, 2)]
    label = save(np.zeros(SHAPE), np.eye(4), tmp_path / "labelsTr" / "ct_1.nii.gz")
    query = QueryVoxel(sources(*images), tmp_path, "imagesTr", label=6)
    assert query.labels == {images[0]: label}
    one, two = sources(*images)
    with pytest.raises(BadScanError, match=r"no label in .*labelsTr; add ct_2.nii.gz or give --voxel"):
        query(two, read_scan(two, None))
    before = query.stamp(one)
    assert before != scan_stamp(one) and query.stamp(two) == scan_stamp(two)
    save(np.ones(SHAPE), np.eye(4), Path(label))
    assert query.stamp(one) != before
    with pytest.raises(InputError, match="labelsTs: no such folder, so there is no label 6 to look for; give --folder"):
        QueryVoxel([one], tmp_path, "imagesTs", label=6)


def test_voxel_of_each_case(tmp_path: Path) -> None:
    shape = shape_of("PIL")
    image = save(np.random.default_rng(0).normal(size=shape), affine_of("PIL"), tmp_path / "imagesTr" / "ct.nii.gz")
    labels = np.zeros((*shape, 1), dtype=np.int16)
    labels[3:6, 7:10, 11:14], labels[20, 2, 2] = 6, 7
    label = save(labels, affine_of("PIL"), tmp_path / "labelsTr" / "ct.nii.gz")
    (source,) = sources(image)
    scan = read_scan(source, None)

    def found(**asked: Any) -> Any:
        return QueryVoxel([source], tmp_path, "imagesTr", **asked)(source, scan)["voxel"]

    last = [size - 1 for size in shape]
    assert found(voxel=last) == tuple(last)
    assert found(label=6) == (4, 8, 12)
    assert found(label=7) == (20, 2, 2)
    for absent in (0, 8):
        with pytest.raises(BadScanError) as error:
            found(label=absent)
        assert str(error.value) == f"{label}: no voxel has label {absent}; its labels are [6, 7]"
    for outside in ([31, 0, 0], [0, -1, 0]):
        with pytest.raises(BadScanError) as error:
            found(voxel=outside)
        assert str(error.value) == f"voxel {outside} is outside its {shape} voxels; indices count from 0"
    save(labels[:-1], affine_of("PIL"), Path(label))
    with pytest.raises(BadScanError, match=rf"{label}: shape .* is not .* as in {image}"):
        found(label=6)
    Path(label).write_bytes(b"no label")
    with pytest.raises(BadScanError, match=f"{label}: cannot be read"):
        found(label=6)


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PIL"])
def test_window_holds_the_query(axcodes: str, tmp_path: Path) -> None:
    """By the bundle's own preparation: the query token's patch covers the voxel, the window stays in the scan."""
    shape, affine = shape_of(axcodes), affine_of(axcodes)
    save(np.random.default_rng(0).normal(size=shape), affine, tmp_path / "ct_1.nii.gz")
    settings = {"dataset_dir": str(tmp_path), "spacing": [2.0, 2.0, 2.0], "img_size": [24, 24, 24], "patch_size": 4}
    prepare = workflow(voxel=[0, 0, 0], **settings).parser.get_parsed_content("preprocessing")
    extent = affine_extent(affine, shape)
    corners = list(product(*((0, size - 1) for size in shape)))
    for voxel in [*corners, tuple(size // 2 for size in shape)]:
        data = prepare({"image": str(tmp_path / "ct_1.nii.gz"), "voxel": voxel})
        image, query = data["image"], data["query"]
        assert image.shape == (1, 24, 24, 24) and data["voxel"].tolist() == list(voxel)
        tokens = token_affine(image.affine.numpy(), (4, 4, 4))
        place = apply_affine(np.linalg.inv(tokens) @ affine, voxel)
        token = np.unravel_index(query, (6, 6, 6))
        assert np.abs(place - token).max() <= 0.5 + 0.5 * 5 / 8  # its own size apart, voxels at the border reach over
        low, high = affine_extent(image.affine.numpy(), (24, 24, 24))
        large = np.array(SHAPE) * ZOOMS >= 48  # here the scan is larger than the window, along the others smaller
        assert large.tolist() == [False, True, True]
        assert (low >= extent[0] - 2)[large].all() and (high <= extent[1] + 2)[large].all()
        if voxel not in corners:
            assert token[1:] == (3, 3)
            assert np.abs(place - token)[1:].max() <= 0.25


def affine_extent(affine: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest corner of a volume in millimetres."""
    corners = apply_affine(affine, [*product(*((-0.5, size - 0.5) for size in shape))])
    return corners.min(axis=0), corners.max(axis=0)


def test_window_crops_what_it_says() -> None:
    values = torch.arange(20.0**3).reshape(1, 20, 20, 20)
    meta = {"original_affine": np.diag([2.0, 2.0, 2.0, 1.0]), "spatial_shape": np.array([10, 10, 10])}
    image = MetaTensor(values, affine=torch.eye(4), meta=meta)
    data = QueryWindowd("image", 8, 4)({"image": image, "voxel": (5, 1, 9)})  # image index (10, 2, 18)
    # The query would be at 2 of patch 1; along the others the window stops at the borders, 0 and 18, of the scan.
    assert torch.equal(data["image"].as_tensor(), values[:, 4:12, 0:8, 11:19])
    assert data["query"] == np.ravel_multi_index((1, 0, 1), (2, 2, 2))


def test_query_goes_last_and_the_others_keep_their_order() -> None:
    ids_shuffle = torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]])
    assert query_last(ids_shuffle, torch.tensor([0, 2])).tolist() == [[2, 3, 1, 0], [1, 3, 0, 2]]


def test_encoder_maps_are_the_softmax_of_the_query() -> None:
    network, image = tiny_mae(), torch.rand(2, 1, 8, 8, 12)
    query = torch.tensor([7, 2])
    with torch.no_grad():
        weights = QueryAttention(network)(image, query)
        tokens = network.vit.embed(image)
        tokens = torch.cat([network.vit.cls_token.expand(2, -1, -1), tokens], dim=1)
        for n, block in enumerate(network.vit.blocks):
            if n in (0, 1, 3):
                q, k, _ = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)
                heads = []
                for head in range(3):
                    part = slice(8 * head, 8 * head + 8)
                    heads.append(torch.softmax(q[:, :, part] @ k[:, :, part].mT / 8**0.5, dim=-1))
                expected = torch.stack(heads).mean(dim=0)
                for b in range(2):
                    found = weights[f"encoder_block_{n}"][b]
                    torch.testing.assert_close(found.flatten(), expected[b, 1 + query[b], 1:])
            tokens = block(tokens)
    assert list(weights) == [f"{kind}_block_{n}" for kind in ("encoder", "cross") for n in (0, 1, 3)]
    assert {tuple(w.shape) for w in weights.values()} == {(2, 1, 2, 2, 3)}


def test_cross_maps_are_of_the_hidden_query_to_visible_tokens() -> None:
    network, image = tiny_mae(), torch.rand(1, 1, 8, 8, 12)
    order = network.shuffle(1, 12)[0].tolist()
    query = order[0]  # visible but for the asking
    visible = order[1:4]
    ids_shuffle = torch.tensor([[*order[1:], query]])
    with torch.no_grad(), attention_maps(network) as maps:
        weights = QueryAttention(network)(image, torch.tensor([query]))
        network(image, ids_shuffle)
    for block, feature in ((0, 3), (1, 1), (2, 0)):  # deep to shallow
        asked = maps[f"decoder.cross_blocks.{block}.cross_attn"][0].mean(dim=0)[12]  # last of CLS and 12 tokens
        found = weights[f"cross_block_{feature}"].flatten()
        torch.testing.assert_close(found[visible], asked[1:])
        assert found.sum() == pytest.approx(1 - asked[0].item(), abs=1e-5)
        assert found.nonzero().flatten().tolist() == sorted(visible)


def test_cross_maps_carry_the_name_of_the_block_that_is_read() -> None:
    network = tiny_mae()
    nn.init.zeros_(network.decoder.decoder_embeds[2].weight)  # all tokens of the deepest feature look alike
    with torch.no_grad():
        weights = QueryAttention(network)(torch.rand(1, 1, 8, 8, 12), torch.tensor([5]))
    spread = {
        feature: float(weights[f"cross_block_{feature}"][weights[f"cross_block_{feature}"] > 0].std())
        for feature in (0, 1, 3)
    }
    assert spread[3] < 1e-6 < min(spread[0], spread[1])
    assert weights["cross_block_3"].max().item() == pytest.approx(1 / 4)  # CLS and three visible tokens


@pytest.mark.parametrize("axcodes", ["RAS", "PIL"])
def test_each_voxel_gets_its_patch(axcodes: str) -> None:
    tokens = np.arange(1.0, 13.0).reshape(2, 2, 3)
    window = from_matvec(np.diag([2.5, 2.5, 2.5]), (-22, 50, 30))  # affine of the image; patches are 10 mm
    affine, shape = affine_of(axcodes), shape_of(axcodes)
    volume = to_scan_grid(tokens, token_affine(window, (4, 4, 4)), affine, shape)
    assert volume.shape == shape and volume.dtype == np.float32
    index = apply_affine(np.linalg.inv(window) @ affine, np.moveaxis(np.indices(shape), 0, -1))
    patch = np.floor((index + 0.5) / 4 + 1e-9).astype(int)
    expected = np.zeros(shape)
    inside = ((patch >= 0) & (patch < tokens.shape)).all(axis=-1)
    expected[inside] = tokens[tuple(patch[inside].T)]
    on_border = (np.abs((index + 0.5) / 4 - np.rint((index + 0.5) / 4)) < 1e-6).any(axis=-1)
    np.testing.assert_array_equal(volume[~on_border], expected[~on_border])
    assert set(np.unique(volume)) == {0, *range(1, 13)}


@pytest.fixture
def scan(tmp_path: Path, datasets: dict[str, Path]) -> Path:
    """A data set of one non-RAS scan that is larger than a window, with its label."""
    root = tmp_path / "data"
    for folder, name in (("imagesTr", "test_000_0000.nii.gz"), ("labelsTr", "test_000.nii.gz")):
        (root / folder).mkdir(parents=True)
        shutil.copy(datasets["btcv"] / folder.replace("Tr", "Ts") / name, root / folder)
    file = root / "imagesTr" / "test_000_0000.nii.gz"
    image: Any = nib.load(file)
    image = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header)
    image.set_sform(image.affine, 1)
    image.header.set_xyzt_units("mm")
    nib.save(image, file)
    return root


def test_maps_of_an_organ_lie_on_the_scan(model: Path, scan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flow = workflow(dataset_dir=str(scan), checkpoint=str(model), output_dir=str(out), folder="imagesTr", label=6)
    flow.initialize()
    flow.run()
    names = {f"test_000_{name}.nii.gz" for name in MAPS} | {"test_000_attention.png", "test_000_attention.json"}
    assert {file.name for file in out.iterdir()} == names

    source = nib.load(scan / "imagesTr" / "test_000_0000.nii.gz")
    assert nib.aff2axcodes(source.affine) != ("R", "A", "S")
    labels = np.asanyarray(nib.load(scan / "labelsTr" / "test_000.nii.gz").dataobj)
    scans = flow.parser.get_parsed_content("dataset")
    assert (len(scans.done), scans.failed) == (1, {})
    data = scans.prepare(scans.data[0])
    voxel = tuple(data["voxel"].tolist())
    assert labels[voxel] == 6
    network: HiEndMAE = flow.parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(model))
    with eval_mode(network):
        weights = QueryAttention(network)(data["image"].as_tensor()[None], torch.tensor([data["query"]]))
    to_window = np.linalg.inv(data["image"].affine.numpy()) @ source.affine
    generator = np.random.default_rng(0)
    places = [voxel, *(tuple(generator.integers(0, source.shape).tolist()) for _ in range(200))]
    for name in MAPS:
        result = nib.load(out / f"test_000_{name}.nii.gz")
        volume = np.asanyarray(result.dataobj)
        assert volume.dtype == np.float32 and volume.shape == source.shape
        np.testing.assert_allclose(result.affine, source.affine, atol=1e-5)
        assert (result.header.get_xyzt_units()[0], int(result.header["sform_code"])) == ("mm", 1)
        seen = 0
        for place in places:
            patch = np.floor((apply_affine(to_window, place) + 0.5) / 12).astype(int)
            inside = ((patch >= 0) & (patch < 4)).all()
            seen += inside
            expected = weights[name][(0, 0, *patch)].item() if inside else 0.0
            assert volume[place] == pytest.approx(expected, abs=1e-6)
        assert 10 < seen < 200
        assert (volume[voxel] == 0) == name.startswith("cross")  # the query itself is masked there
    picture = imread(out / "test_000_attention.png")[..., :3]
    assert 0.02 < (np.ptp(picture, axis=-1) > 0.1).mean() < 0.5  # in colour, over grey


def test_maps_of_a_voxel(model: Path, scan: Path, tmp_path: Path) -> None:
    """In a flat folder of scans, whose labels nobody needs."""
    flow = workflow(
        dataset_dir=str(scan / "imagesTr"), checkpoint=str(model), output_dir=str(tmp_path), voxel=[30, 20, 10]
    )
    flow.initialize()
    flow.run()
    volume = np.asanyarray(nib.load(tmp_path / "test_000_encoder_block_9.nii.gz").dataobj)
    assert volume[30, 20, 10] > 0 and volume[30, 20, 47] == 0


def test_maps_that_are_lost_or_of_other_blocks_are_made_again(model: Path, scan: Path, tmp_path: Path) -> None:
    def run(**settings: Any) -> tuple[int, int]:
        flow = workflow(
            dataset_dir=str(scan / "imagesTr"), checkpoint=str(model), output_dir=str(tmp_path), voxel=[30, 20, 10],
            **settings,
        )  # fmt: skip
        flow.initialize()
        flow.run()
        scans = flow.parser.get_parsed_content("dataset")
        return len(scans.done), len(scans.skipped)

    assert run() == (1, 0)
    (tmp_path / "test_000_cross_block_6.nii.gz").unlink()
    assert run() == (1, 0)
    assert run() == (0, 1)
    assert run(**{"network_def#out_indices": [1, 5, 11]}) == (1, 0)
    names = {f"test_000_{kind}_block_{block}.nii.gz" for kind in ("encoder", "cross") for block in (1, 5, 11)}
    assert {file.name for file in tmp_path.glob("*.nii.gz")} == names


def test_voxel_of_the_command_line(model: Path, scan: Path, tmp_path: Path, clone: Path) -> None:
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file"]
    words += ["['configs/inference.json','configs/attention.json','configs/tiny.json']"]
    words += [
        "--dataset_dir",
        str(scan / "imagesTr"),
        "--checkpoint",
        str(model),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    file = scan / "imagesTr" / "test_000_0000.nii.gz"
    shape = nib.load(file).shape
    words += ["--voxel", f"[{shape[0]},0,10]"]
    environment = {**os.environ, "PYTHONPATH": ""}
    folder = clone / "hi_end_mae_pretrain"
    refused = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and not (tmp_path / "out").exists()
    assert refused.stderr.splitlines()[-2:] == [
        "error: 1 of 1 scan(s) not mapped:",
        f"{file}: voxel [{shape[0]}, 0, 10] is outside its {shape} voxels; indices count from 0",
    ]


def test_wrong_requests_say_so_in_one_line(model: Path, scan: Path) -> None:
    settings = {"dataset_dir": str(scan), "checkpoint": str(model), "folder": "imagesTr"}
    assert complaint(**settings).startswith("voxel is None and label is None: give exactly one")
    assert complaint(**settings, label=6, voxel=[1, 1, 1]).startswith("voxel is [1, 1, 1] and label is 6: give")
    assert complaint(**settings, voxel=[1, 1]).startswith("voxel is [1, 1]: give three integers")
    assert "none.pt: no trained weights there" in complaint(**{**settings, "checkpoint": "none.pt"}, label=6)


def test_a_scan_that_fails_costs_itself_alone(model: Path, scan: Path, tmp_path: Path) -> None:
    """And a second time nothing is left to do, until a label changes."""
    good, other = scan / "labelsTr" / "test_000.nii.gz", scan / "labelsTr" / "other.nii.gz"
    shutil.copy(scan / "imagesTr" / "test_000_0000.nii.gz", scan / "imagesTr" / "other_0000.nii.gz")
    other.write_bytes(good.read_bytes()[:-100])
    settings = {"dataset_dir": str(scan), "checkpoint": str(model), "folder": "imagesTr", "output_dir": str(tmp_path)}

    def run() -> tuple[int, int, list[str]]:
        flow = workflow(**settings, label=6)
        flow.initialize()
        scans = flow.parser.get_parsed_content("dataset")
        with pytest.raises((RuntimeError, InputError)) as error:
            flow.run()
        return len(scans.done), len(scans.skipped), str(input_error_in(error.value)).splitlines()

    done, skipped, said = run()
    assert (done, skipped, said[0]) == (1, 0, "1 of 2 scan(s) not mapped:")
    assert said[1].startswith(f"{scan / 'imagesTr' / 'other_0000.nii.gz'}: {other}: cannot be read")
    assert run()[:2] == (0, 1)
    labels = nib.load(good)
    nib.save(nib.Nifti1Image(np.asanyarray(labels.dataobj), labels.affine), good)
    assert run()[:2] == (1, 0)


def test_figure_marks_the_query_and_scales_each_panel() -> None:
    affine, shape, query = np.diag([2.0, 2.0, 2.0, 1.0]), (20, 30, 10), (4, 25, 3)
    image = orthogonal_planes(np.zeros(shape), affine, query)[0]
    assert image.centre == (29 - 25, 19 - 4)  # radiological: right at the left, anterior at the top
    encoder, cross = np.zeros(shape), np.zeros(shape)
    encoder[:10], encoder[:5] = 0.25, 0.5
    cross[:5] = 0.125
    maps = {
        kind: {feature: orthogonal_planes(volume, affine, query)[0] for feature in ("feature 3", "feature 6")}
        for kind, volume in {"encoder": encoder, "cross": cross}.items()
    }
    maps["cross"]["feature 6"] = orthogonal_planes(np.zeros(shape), affine, query)[0]
    figure = attention_figure(image, maps, title="ct_1")
    assert [panel.get_title() for panel in figure.axes[:2]] == ["feature 3", "feature 6"]
    assert [panel.get_ylabel() for panel in figure.axes[::2]] == ["encoder", "cross"]
    texts = [panel.texts[-1].get_text() for panel in figure.axes]
    assert texts == ["25.00 to 50.00 %"] * 2 + ["12.50 to 12.50 %", "0.00 to 0.00 %"]
    for panel in figure.axes:
        (mark,) = panel.lines
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (15, 4)
        assert panel.get_xlim() == (-0.5, 19.5) and panel.get_ylim() == (29.5, -0.5)
    colours = figure.axes[0].images[-1].get_array()
    assert (colours[:, :10, 3] == 0).all()  # the patient's right, where x is high, and there was no attention
    assert (colours[:, 15:, 3] > colours[:, 10:15, 3]).all() and (colours[:, 10:15, 3] > 0).all()
    assert "one window" in figure.texts[-1].get_text() and figure.texts[0].get_text() == "ct_1"
