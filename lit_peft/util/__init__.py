"""Helpers for all other packages: errors, disk, memory, lazy imports, type checks. They import none of those."""
