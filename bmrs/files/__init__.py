"""Compacted models in files without pickle."""

from bmrs.files.exporting import ExportReport, export
from bmrs.files.file import load, save
from bmrs.files.pretrained import load_pretrained, save_pretrained

__all__ = ["ExportReport", "export", "load", "load_pretrained", "save", "save_pretrained"]
