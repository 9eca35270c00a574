"""Solves single puzzles and shows each step."""
