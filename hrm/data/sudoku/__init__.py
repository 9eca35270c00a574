"""Sudoku: sources, solver, symmetries and the builder."""
