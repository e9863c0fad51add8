"""Compacted models in files without pickle."""

from bmrs.files.file import load, save

__all__ = ["load", "save"]
