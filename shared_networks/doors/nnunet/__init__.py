"""Trainers that nnU-Net v2 finds in this folder by `nnUNet_extTrainer`."""
