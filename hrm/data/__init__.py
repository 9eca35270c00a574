"""Puzzle data sets: the layout on disk, its reader, and the builders (`python -m hrm.data`)."""
