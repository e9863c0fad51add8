"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.records import RESULTS


def positive(text: str) -> int:
    """Return a positive number given as text."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def add_device_and_record(parser: argparse.ArgumentParser) -> None:
    """Add the device to measure and the folder to keep the rows in."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=best, help="%(default)s")
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="FOLDER",
        help="keep the rows, by default among the committed results",
    )
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
