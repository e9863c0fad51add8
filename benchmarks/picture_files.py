"""Committed pictures carry a digest of the rows that they show, which tells whether they are stale."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DIGEST = "Rows"  # name of the digest in a picture's metadata
DPI = 110


def digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a text that changes with the rows."""
    text = json.dumps(list(rows), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def digest_in(path: Path) -> str | None:
    """Return the digest that a picture carries."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(DIGEST)
