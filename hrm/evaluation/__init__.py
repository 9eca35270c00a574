"""Metrics of a trained model and the voting over ARC augmentations."""
