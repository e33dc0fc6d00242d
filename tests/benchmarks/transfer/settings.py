"""What is compared, and how large: overrides of the bundles' settings, by their names on the command line."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

ARMS: dict[str, Settings | None] = {  # overrides of pre-training; none without
    "from scratch": None,
    # Six plain blocks have about as many weights as two plain and three cross blocks.
    "plain MAE": {"network_def#out_indices": [], "network_def#decoder_self_layers": 6},
    "Hi-End-MAE": {},
}

# Each but for one thing as Hi-End-MAE, which has taps 3, 6 and 9, a decoder of 5 blocks, and mask ratio 0.75.
ABLATIONS: dict[str, Settings] = {
    "taps: last block": {"network_def#out_indices": [11], "network_def#decoder_self_layers": 4},
    "taps: all 12 blocks": {"network_def#out_indices": list(range(12)), "network_def#decoder_self_layers": 0},
    "decoder: 3 blocks": {"network_def#decoder_self_layers": 0},
    "decoder: 9 blocks": {"network_def#decoder_self_layers": 6},
    "mask ratio 0.5": {"network_def#mask_ratio": 0.5},
    "mask ratio 0.9": {"network_def#mask_ratio": 0.9},
}
ABLATION_LABELS = 4

# `network` is for every bundle, `encoder` for both trainings. Steps are the same for any number of cases.
SIZES: dict[str, Settings] = {
    "smoke": {
        "arms": ["from scratch", "Hi-End-MAE"],
        "labels": [1],
        "seeds": [0],
        "phantoms": {"train": 3, "test": 2, "voxel_mm": 6.0},
        "network": {"device": "cpu", "spacing": [8.0, 8.0, 8.0], "img_size": [32, 32, 32], "patch_size": 8},
        "encoder": {"network_def#hidden_size": 24, "network_def#num_heads": 2},
        "pretraining": {
            "steps": 4,
            "batch_size": 2,
            "num_samples": 2,
            "num_workers": 0,
            "val_fraction": 0.1,
            "network_def#decoder_hidden_size": 12,
            "network_def#decoder_num_heads": 2,
        },
        "fine-tuning": {"steps": 4, "num_samples": 1, "num_workers": 0, "network_def#feature_size": 4},
    },
    # Chosen on other phantoms, with 4 labelled cases. One crop a step: many steps did more than large ones. Layer-wise
    # decay of the learning rate made no difference from scratch (Dice 0.489 and, without, 0.495 after 800 steps), but
    # at the full rate a pre-trained encoder forgets: Dice 0.169 after 300 steps, 0.302 with it.
    "cpu": {
        "arms": list(ARMS),
        "labels": [1, 4, 16],
        "seeds": [0, 1, 2],
        "phantoms": {"train": 64, "test": 8, "voxel_mm": 3.0, "seed": 100},
        "network": {
            "device": "cpu",
            "amp": True,
            "spacing": [6.0, 6.0, 6.0],
            "img_size": [32, 32, 32],
            "patch_size": 8,
        },
        "encoder": {"network_def#hidden_size": 96, "network_def#num_heads": 4},
        "pretraining": {
            "steps": 1500,
            "batch_size": 4,
            "num_samples": 8,
            "num_workers": 0,
            "val_fraction": 0.1,
            "learning_rate": 2e-3,
            "train#random_transforms#0#flip_prob": 0.0,
            "train#random_transforms#0#rotate_prob": 0.0,
            "network_def#decoder_hidden_size": 48,
            "network_def#decoder_num_heads": 3,
        },
        "fine-tuning": {
            "steps": 512,
            "num_samples": 1,
            "num_workers": 0,
            "learning_rate": 4e-3,
            "optimizer#params#layer_decay": 0.75,
            "background_weight": 0.1,
            "flip_axes": [],
            "train#random_transforms#2#prob": 0.0,
            "network_def#feature_size": 8,
        },
    },
    "gpu": {
        "arms": list(ARMS),
        "labels": [1, 4, 16],
        "seeds": [0, 1, 2],
        "jobs": 4,
        "phantoms": {"train": 64, "test": 8, "voxel_mm": 2.0, "seed": 100},
        "network": {"spacing": [3.0, 3.0, 3.0], "img_size": [64, 64, 64], "patch_size": 8},
        "encoder": {"network_def#hidden_size": 384, "network_def#num_heads": 6},
        "pretraining": {
            "steps": 8000,
            "batch_size": 8,
            "num_samples": 8,
            "num_workers": 4,
            "val_fraction": 0.1,
            "learning_rate": 1e-3,
            "train#random_transforms#0#flip_prob": 0.0,
            "train#random_transforms#0#rotate_prob": 0.0,
            "network_def#decoder_hidden_size": 192,
            "network_def#decoder_num_heads": 6,
        },
        "fine-tuning": {
            "steps": 2400,
            "num_samples": 2,
            "num_workers": 2,
            "learning_rate": 1e-3,
            "optimizer#params#layer_decay": 0.75,
            "background_weight": 0.1,
            "flip_axes": [],
            "train#random_transforms#2#prob": 0.0,
            "network_def#feature_size": 16,
        },
    },
}
