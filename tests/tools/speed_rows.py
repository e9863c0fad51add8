"""Made-up records of speed, for the tests of tables and plots."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

VERSIONS = {"torch": "2.13.0", "triton": "3.9.0", "numba": "none", "date": "2026-01-02T03:04:05+00:00"}
ABOUT = {"CPU": "Some(R) CPU", "threads": 2, **VERSIONS}
GPU = {"GPU": "Some GPU", **VERSIONS}


def times(median: float) -> Row:
    return {"median": median, "p20": 0.9 * median, "p80": 1.2 * median}


def spread(value: float) -> Row:
    return {"value": value, "low": 0.9 * value, "high": 1.2 * value}


def function_rows() -> list[Row]:
    """Return noise at two shapes and two granularities, a function of structures, and one that has no backward."""
    cases: list[tuple[str, list[int], str | None, tuple[str, ...]]] = [
        ("multiply_noise", [64, 18, 28, 28], "element", ("forward", "both")),
        ("multiply_noise", [128, 100], "element", ("forward", "both")),
        ("multiply_noise", [64, 18, 28, 28], "sample", ("both",)),
        ("kl_divergence", [26_560], None, ("both",)),
        ("kl_divergence", [226], None, ("both",)),
        ("noise_snr", [26_560], None, ("forward",)),
    ]
    milliseconds = {"numba": 2.0, "torch": 12.0, "plain": 6.0, "copy": 0.5}
    return [
        {
            "function": function,
            "shape": shape,
            "dim": 1,
            "dtype": "float32",
            "granularity": granularity,
            "direction": direction,
            "competitor": competitor,
            "milliseconds": times(milliseconds[competitor]),
            "turns": [milliseconds[competitor]] * 3,
            "bytes_moved": 20 * shape[0],
            "gb_per_s": 1.0 / milliseconds[competitor],
            "share_of_copy": spread(0.5 / milliseconds[competitor]),
            "ratio_to_plain": spread(milliseconds[competitor] / 6.0),
            "peak_memory": None,
            "saved_for_backward": {"inputs": 1.0, "others": 4.25 if competitor == "plain" else 0.01},
        }
        for function, shape, granularity, directions in cases
        for direction in directions
        for competitor in milliseconds
    ]


def step_rows() -> list[Row]:
    """Return a network and a stand-in, without noise and with noise of both kinds."""
    ways = [("no noise", None, 1.0), ("project", "element", 1.5), ("plain", "element", 2.5)]
    return [
        {
            "network": network,
            "stand_in": stand_in,
            "batch": 32,
            "input": [1, 32, 32],
            "granularity": granularity,
            "way": way,
            "mode": "eager",
            "dtype": "float32",
            "milliseconds": times(4.0 * ratio),
            "ratio": spread(ratio),
            "paper_ratio": paper,
        }
        for network, stand_in, paper in (("LeNet-5", False, 4.9), ("small ResNet-50", True, 6.9))
        for way, granularity, ratio in ways
    ]


def pruning_rows() -> list[Row]:
    """Return a decision, a compaction and the latencies of a batch size."""
    base = {"network": "MLP", "criterion": None, "batch": None, "model": None, "speedup": None}
    return [
        base | {"kind": "decision", "criterion": "BMRSNormal()", "milliseconds": times(3.5)},
        base | {"kind": "compaction", "milliseconds": times(7.5)},
        *(
            base
            | {"kind": "latency", "batch": 8, "model": model, "milliseconds": times(1.0 / factor)}
            | {"speedup": spread(factor)}
            for model, factor in (("dense", 1.0), ("masked", 0.5), ("compacted", 4.0))
        ),
    ]


def scaling_rows() -> list[Row]:
    """Return a sweep that is as it should be and a defect."""
    base = {"backend": "torch", "sizes": [100, 1000, 10_000], "fitted_from": 1000}
    base |= {"milliseconds": [times(time) for time in (1.0, 2.0, 20.0)], "shortest": [0.9, 1.8, 18.0]}
    return [
        base | {"name": "kl_divergence", "unit": "structures", "slope": 0.97, "defect": False},
        base | {"name": "bmrs.prune(model)", "unit": "noise layers", "slope": 1.3, "defect": True},
    ]


def all_rows() -> dict[str, list[Row]]:
    """Return the rows by suite."""
    return {
        "functions": function_rows(),
        "step": step_rows(),
        "pruning": pruning_rows(),
        "scaling": scaling_rows(),
    }
