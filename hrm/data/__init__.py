"""Puzzle data sets: the file format, its reader, and the builders (`python -m hrm.data`)."""
