"""ARC tasks: sources, augmentation and the builder."""
