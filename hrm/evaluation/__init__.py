"""Metrics of a trained model, many paths per puzzle, and voting over ARC augmentations."""
