"""What is compared, and how large: overrides of the bundles' settings, by their names on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Settings = dict[str, Any]
AS_IS: Mapping[str, Any] = MappingProxyType({})


class Variant(NamedTuple):
    """A way to pre-train and to fine-tune.

    Args:
        pretraining: overrides of pre-training; None trains from scratch.
        encoder_of: the variant whose pre-trained encoders it takes; by default its own.
        unlabelled: the CTs to pre-train on, `synthetic`, `real` or `both`.
        network: overrides of both trainings.
        fine_tuning: overrides of fine-tuning.
        configs: of fine-tuning, beside `train`.
    """

    pretraining: Mapping[str, Any] | None = AS_IS
    encoder_of: str | None = None
    unlabelled: str = "synthetic"
    network: Mapping[str, Any] = AS_IS
    fine_tuning: Mapping[str, Any] = AS_IS
    configs: tuple[str, ...] = ()


SCRATCH, PLAIN, OURS, FROZEN = "from scratch", "plain MAE", "Hi-End-MAE", "Hi-End-MAE, frozen"

ARMS = {
    SCRATCH: Variant(None),
    # Six plain blocks have about as many weights as two plain and three cross blocks.
    PLAIN: Variant({"network_def#out_indices": [], "network_def#decoder_self_layers": 6}),
    OURS: Variant(),
    FROZEN: Variant(encoder_of=OURS, fine_tuning={"optimizer#params#freeze_encoder": True}),
}

CROP = "train#random_transforms#0"
THIRD = "train#random_transforms#2#prob"


def organ_crops(spatial_size: str) -> Settings:
    """Centre every other crop on an organ, each as often: a fine-tuning of few steps else sees little but the liver."""
    return {
        "_target_": "RandCropByLabelClassesd",
        "keys": ["image", "label"],
        "label_key": "label",
        "spatial_size": spatial_size,
        "ratios": "$[@num_classes - 1] + [1] * (@num_classes - 1)",
        "num_classes": "@num_classes",
        "num_samples": "@num_samples",
        "image_key": "image",
        "image_threshold": 0,
        "allow_smaller": True,
        "warn": False,
    }


# The overlay's crops are larger, so that a turned one is filled, and its third transform is another one.
STRONG: Settings = {
    "configs": ("strong_augmentation",),
    "fine_tuning": {CROP: organ_crops("$[n * 4 // 3 for n in @img_size]"), THIRD: 0.2},
}

# Each but for one thing as Hi-End-MAE, which has taps 3, 6 and 9, a decoder of 5 blocks, mask ratio 0.75 and patches of
# 18 mm, and was pre-trained on synthetic CTs. Augmentation and patches change fine-tuning too: these have a training
# from scratch beside them. Each size adds its patches.
ABLATIONS = {
    "taps: last block": Variant({"network_def#out_indices": [11], "network_def#decoder_self_layers": 4}),
    "taps: all 12 blocks": Variant({"network_def#out_indices": list(range(12)), "network_def#decoder_self_layers": 0}),
    "decoder: 3 blocks": Variant({"network_def#decoder_self_layers": 0}),
    "decoder: 9 blocks": Variant({"network_def#decoder_self_layers": 6}),
    "mask ratio 0.5": Variant({"network_def#mask_ratio": 0.5}),
    "mask ratio 0.9": Variant({"network_def#mask_ratio": 0.9}),
    "real CTs": Variant(unlabelled="real"),
    "real and synthetic CTs": Variant(unlabelled="both"),
    "strong augmentation": Variant(encoder_of=OURS, **STRONG),
    "strong augmentation, from scratch": Variant(None, **STRONG),
}
MAIN_LABELS = 4
CURVES = {16: (0.25, 0.5, 2.0, 4.0, 8.0), MAIN_LABELS: (0.25, 0.5, 2.0, 4.0)}
"""Shares of the steps for which `CURVE_ARMS` are trained too, by number of labelled cases."""
CURVE_ARMS = (SCRATCH, OURS)


def upsamplings(patch_size: int) -> Settings:
    """As many doublings as suit patches, see :class:`shared_networks.networks.unetr.HiEndUNETR`."""
    return {"network_def#num_upsamples": 1 if patch_size < 4 else 2 if patch_size < 8 else 3}


def patch_ablations(size: Settings) -> dict[str, Variant]:
    """Variants of a size with other patches, by millimetres."""
    found: dict[str, Variant] = {}
    for voxels in size["patches"]:
        name, network = f"patches of {voxels * size['network']['spacing'][0]:g} mm", {"patch_size": voxels}
        for end, pretraining in (("", AS_IS), (", from scratch", None)):
            found[name + end] = Variant(pretraining, network=network, fine_tuning=upsamplings(voxels))
    return found


_PRETRAINING: Settings = {
    "muon": True,
    "learning_rate": 0.005,
    "max_grad_norm": 1.0,
    "network_def#local_init": True,
    "val_fraction": 0.1,
    "cache_rate": 0.0,
    "train#random_transforms#0#flip_prob": 0.0,
    "train#random_transforms#0#rotate_prob": 0.0,
}
_FINE_TUNING: Settings = {
    "muon": True,
    "learning_rate": 0.003,
    "max_grad_norm": 1.0,
    "background_weight": 0.1,
    "flip_axes": [],
    "optimizer#params#layer_decay": 0.75,
    CROP: organ_crops("@img_size"),
    THIRD: 0.0,
}
"""The recipes of the weights that ship, without crops turned by right angles. With a decay by layers: without it a
pre-trained encoder forgets."""

# `network` is for every bundle, `encoder` for both trainings. Steps of fine-tuning, and the crops of each, are the same
# for any number of cases; the crops come from up to 4 cases.
SIZES: dict[str, Settings] = {
    "smoke": {
        "arms": [OURS, FROZEN],
        "labels": [1],
        "pretrainings": 1,
        "seeds": [0],
        "phantoms": {"unlabelled": 3, "labelled": 4, "test": 1, "voxel_mm": 6.0},
        "network": {"device": "cpu", "spacing": [9.0, 9.0, 9.0], "img_size": [16, 16, 16], "patch_size": 2},
        "patches": [4],
        "encoder": {"network_def#hidden_size": 24, "network_def#num_heads": 2},
        "pretraining": _PRETRAINING
        | {
            "steps": 4,
            "batch_size": 2,
            "num_samples": 2,
            "num_workers": 0,
            "network_def#decoder_hidden_size": 12,
            "network_def#decoder_num_heads": 2,
        },
        "fine-tuning": _FINE_TUNING
        | upsamplings(2)
        | {"steps": 4, "crops": 1, "num_workers": 0, "network_def#feature_size": 4},
    },
    "cpu": {
        "arms": list(ARMS),
        "labels": [1, 4, 16, 64],
        "pretrainings": 3,
        "seeds": [0, 1, 2],
        "phantoms": {"unlabelled": 128, "labelled": 64, "test": 12, "voxel_mm": 4.0},
        # At this width float32 is faster than bfloat16, on a CPU and on a GPU, which is used if there is one.
        "network": {"amp": False, "spacing": [6.0, 6.0, 6.0], "img_size": [24, 24, 24], "patch_size": 3},
        "patches": [2, 6],
        "encoder": {"network_def#hidden_size": 96, "network_def#num_heads": 4},
        "pretraining": _PRETRAINING
        | {
            "steps": 512,
            "batch_size": 4,
            "num_samples": 8,
            "num_workers": 0,
            "network_def#decoder_hidden_size": 48,
            "network_def#decoder_num_heads": 2,
        },
        "fine-tuning": _FINE_TUNING
        | upsamplings(3)
        | {"learning_rate": 0.01, "steps": 384, "crops": 4, "num_workers": 0, "network_def#feature_size": 16},
    },
    # The small network, of which weights ship.
    "small": {
        "arms": list(ARMS),
        "labels": [1, 4, 16, 64],
        "pretrainings": 3,
        "seeds": [0, 1, 2],
        "jobs": 6,
        "phantoms": {"unlabelled": 128, "labelled": 64, "test": 12, "voxel_mm": 3.0},
        "network": {"spacing": [3.0, 3.0, 3.0], "img_size": [60, 60, 60], "patch_size": 6},
        "patches": [4, 12],
        "encoder": {"network_def#hidden_size": 192, "network_def#num_heads": 6},
        "pretraining": _PRETRAINING
        | {
            "steps": 1280,
            "batch_size": 4,
            "num_samples": 8,
            "num_workers": 2,
            "network_def#decoder_hidden_size": 96,
            "network_def#decoder_num_heads": 6,
        },
        "fine-tuning": _FINE_TUNING
        | upsamplings(6)
        | {"steps": 1024, "crops": 16, "num_workers": 2, "network_def#feature_size": 16},
    },
    # The published network and patches.
    "gpu": {
        "arms": list(ARMS),
        "labels": [1, 4, 16, 64],
        "pretrainings": 3,
        "seeds": [0, 1, 2],
        "jobs": 1,
        "phantoms": {"unlabelled": 128, "labelled": 64, "test": 12, "voxel_mm": 1.5},
        "network": {"spacing": [1.5, 1.5, 1.5], "img_size": [96, 96, 96], "patch_size": 12},
        "patches": [8, 24],
        "encoder": {"network_def#hidden_size": 1536, "network_def#num_heads": 16},
        "pretraining": _PRETRAINING | {"steps": 10240, "batch_size": 4, "num_samples": 8, "num_workers": 8},
        "fine-tuning": _FINE_TUNING | upsamplings(12) | {"steps": 8192, "crops": 4, "num_workers": 8},
    },
}
