"""Mazes: sources, search and the builder."""
