"""Compacted models in files without pickle."""

from bmrs.files.exporting import ExportReport, export
from bmrs.files.file import load, save

__all__ = ["ExportReport", "export", "load", "save"]
