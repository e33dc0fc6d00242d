from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shared_networks.doors import bundles
from shared_networks.errors import InputError
from shared_networks.synthetic.tissues import label_names
from tests.conftest import BUNDLES, ROOT

PRETRAIN, BTCV, FLARE = BUNDLES


def test_bundles_of_a_clone_lie_beside_the_package() -> None:
    assert bundles.all_bundles() == {name: ROOT / name for name in sorted(BUNDLES)}
    assert bundles.segmenters() == {"btcv": ROOT / BTCV, "flare": ROOT / FLARE}
    assert bundles.label_names(ROOT / FLARE) == list(label_names("flare"))
    assert bundles.label_names(ROOT / PRETRAIN) == []


def test_bundles_of_a_wheel_lie_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / BTCV / "configs", tmp_path / "shipped" / "hi_end_mae_btcv_seg" / "configs")
    monkeypatch.setattr(bundles, "SHIPPED", tmp_path / "shipped")
    assert bundles.all_bundles() == {BTCV: tmp_path / "shipped" / BTCV}


@pytest.mark.parametrize("name", ["flare", FLARE])
def test_a_bundle_is_found_by_its_short_and_its_full_name(name: str) -> None:
    assert bundles.find_segmenter(name) == ROOT / FLARE


@pytest.mark.parametrize("name", ["amos", PRETRAIN, "", "../hi_end_mae_btcv_seg"])
def test_a_name_of_no_segmenter_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"^--bundle {name}: no bundle .* give btcv or flare$"):
        bundles.find_segmenter(name)


def test_no_bundle_at_all_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "SHIPPED", tmp_path)
    with pytest.raises(InputError, match="no bundles beside shared_networks"):
        bundles.all_bundles()
