"""The prose of SciPy's documentation, by the part of SciPy that it describes: texts that come with a package."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from functools import partial

from bmrs.examples.comparison import needed

TOPICS = {
    "cluster": ("cluster.hierarchy", "cluster.vq"),
    "fft": ("fft",),
    "integrate": ("integrate",),
    "interpolate": ("interpolate",),
    "linalg": ("linalg",),
    "ndimage": ("ndimage",),
    "optimize": ("optimize",),
    "signal": ("signal", "signal.windows"),
    "sparse": ("sparse", "sparse.linalg", "sparse.csgraph"),
    "spatial": ("spatial", "spatial.distance", "spatial.transform"),
    "special": ("special",),
    "stats": ("stats", "stats.mstats", "stats.qmc"),
}
MOST_PARAGRAPHS = 8
"""Of one function or class, so that none counts for too much."""


def paragraphs(docstring: str) -> list[str]:
    """Return a docstring's prose: paragraphs of the introduction and of the notes."""
    section, found = "", []
    for block in re.split(r"\n\s*\n", docstring):
        lines = [line.strip() for line in block.strip().split("\n")]
        if len(lines) > 1 and re.fullmatch(r"[-=]{3,}", lines[1]):
            section, lines = lines[0], lines[2:]
        text = " ".join(lines)
        if (
            section in ("", "Notes")
            and re.match(r"[A-Z]", text)
            and len(re.findall(r"[A-Za-z]{2,}", text)) >= 8
        ):
            found.append(text)
    return found


def documents() -> list[tuple[int, list[str]]]:
    """Return the topic and the paragraphs of each function and class, without what stands in more than one of them."""
    found: dict[tuple[int, str], list[str]] = {}
    for topic, modules in enumerate(TOPICS.values()):
        for module in modules:
            scipy = needed(f"scipy.{module}")
            names = getattr(scipy, "__all__", [name for name in vars(scipy) if name[0] != "_"])
            for name in sorted(names):
                thing = getattr(scipy, name)
                members = (
                    [v for k, v in sorted(vars(thing).items()) if k[0] != "_"]
                    if inspect.isclass(thing)
                    else []
                )
                if callable(thing):
                    texts = [
                        text for part in (thing, *members) for text in paragraphs(inspect.getdoc(part) or "")
                    ]
                    found.setdefault((topic, name), []).extend(texts)
    # Boilerplate differs in names and numbers only.
    core = partial(re.sub, r"`[^`]*`|\d", "")
    times = Counter(key for texts in found.values() for key in {core(text) for text in texts})
    alone = {key: [t for t in dict.fromkeys(texts) if times[core(t)] == 1] for key, texts in found.items()}
    return [(topic, texts[:MOST_PARAGRAPHS]) for (topic, _), texts in alone.items() if texts]
