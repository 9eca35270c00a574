"""The training step and inference: compiled, captured in a CUDA graph, measured."""
