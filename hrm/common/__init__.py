"""Errors, files and text that every part shares."""
