"""Made-up times of the GPU check."""

from __future__ import annotations

from benchmarks.speed.stopwatch import Round, ratio, summary

LARGE = {"activation": "64x64x112x112", "x_bytes": 64 << 20}


def times(*rounds: float) -> dict:
    return summary([Round([time], queued=True) for time in rounds])


def timing_row(share: float, *, eager: float | None = None, **changes) -> dict:
    """Return a row whose Triton time is 1 ms."""
    row = LARGE | {"dtype": "float32", "granularity": "sample", "direction": "forward"} | changes
    triton, copy = times(1.0, 1.0), times(share, share)
    row |= {"times": {"triton": triton, "copy": copy}, "gb_per_s": 3000.0}
    row |= {"share_of_copy": ratio(copy, triton), "speedup": {}}
    if eager is not None:
        row["speedup"]["eager"] = ratio(times(eager, eager), triton)
    return row
