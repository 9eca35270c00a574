"""Errors, files and text shared by all packages."""
