"""Energy that parts of a run take, measured or estimated by codecarbon; nothing is sent anywhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bmrs.checks import one_line
from bmrs.training.checkpoint import TrainingState

_JOULES = 3.6e6  # of a kWh

# What codecarbon calls its ways to tell the processor's energy, and what they are.
_ESTIMATED = "estimated from the processor's nominal power"
_WAYS = {
    "intel_rapl": "RAPL, which counts the whole processor",
    "windows_emi": "the energy meter of Windows, which counts the whole processor",
    "intel_power_gadget": "Intel Power Gadget, which counts the whole processor",
    "AppleSiliconChip": "powermetrics, which counts the whole processor",
    "Raspberry": "the power meter of the Raspberry Pi",
    "cpu_load": f"{_ESTIMATED} and the load of this process",
    "constant": f"{_ESTIMATED} alone",
}


class EnergyMeter:
    """Tells the energy of the processor and of the GPU that is used, not that of memory, disks and cooling.

    Attributes:
        method: how the energy comes about, as words: a counter's name, "estimated from ..." where there is none, or
            "not measured: ..." with the reason.

    Raises:
        ImportError: codecarbon is missing.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            from codecarbon import OfflineEmissionsTracker
        except ImportError as error:
            raise ImportError(
                "energy is measured with codecarbon, which is missing: pip install codecarbon"
            ) from error
        self._on_gpu = device.type == "cuda"
        self._tracker: Any = None
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # before it has read its own log_level
        try:
            # All of it is said here, so that no configuration file of codecarbon's has it write, send or look up.
            self._tracker = OfflineEmissionsTracker(
                output_methods=[],
                emissions_endpoint=False,
                log_level="critical",
                allow_multiple_runs=True,  # otherwise it takes Ctrl-C for itself
                tracking_mode="process",
                measure_power_secs=1,
                force_carbon_intensity_g_co2e_kwh=1.0,
                pue=1.0,
                **({"gpu_ids": [device.index or 0]} if self._on_gpu else {}),
            )
            # It looks for meters with the first task, which takes a second or two.
            self._tracker.start_task()
            self._tracker.stop_task()
            self.method = _method(self._tracker, on_gpu=self._on_gpu)
        except Exception as error:  # whatever the drivers of a machine come up with
            self._tracker = None
            self.method = f"not measured: codecarbon gave {type(error).__name__}: {one_line(error)}"

    def start(self) -> None:
        """Begin a measurement."""
        if self._tracker is not None:
            self._tracker.start_task()

    def stop(self) -> float | None:
        """Return the joules since `start`; None if they cannot be told."""
        if self._tracker is None:
            return None
        parts = self._tracker.stop_task()
        joules = _JOULES * (parts.cpu_energy + (parts.gpu_energy if self._on_gpu else 0.0))
        return joules if joules > 0 else None


def _method(tracker: Any, *, on_gpu: bool) -> str:
    """Return how a tracker that has run tells energy; it has no public attribute for that."""
    parts = {type(part).__name__: getattr(part, "_mode", None) for part in getattr(tracker, "_hardware", ())}
    known = [way for name, mode in parts.items() if (way := _WAYS.get(mode or "") or _WAYS.get(name))]
    processor = known[0] if known else "in a way that codecarbon does not tell"
    if not on_gpu:
        return processor
    gpu = "the driver's counter (NVML or AMD SMI)" if "GPU" in parts else "not measured"
    return f"GPU: {gpu}; processor: {processor}"


@contextmanager
def epochs_measured(
    meter: EnergyMeter | None, save: Callable[[TrainingState], None]
) -> Iterator[Callable[[TrainingState], None]]:
    """Give a `save` that first notes in the row of its epoch what it took: "joules", and "energy_by" which method."""
    if meter is None:
        yield save
        return

    def noting(state: TrainingState) -> None:
        state.history[-1] |= {"joules": meter.stop(), "energy_by": meter.method}
        save(state)
        meter.start()

    meter.start()
    try:
        yield noting
    finally:
        meter.stop()


@torch.inference_mode()
def joules_of_inference(
    models: Mapping[str, nn.Module], images: Tensor, meter: EnergyMeter, *, seconds: float = 2.0
) -> dict[str, float | None]:
    """Return by name what 1,000 images take, J; None if that cannot be told.

    Args:
        models: models in evaluation mode.
        images: a batch, which each model is given over and over.
        meter: on the device of the images.
        seconds: how long, at least, each model is measured: meters are read about every second.
    """
    joules = {}
    for name, model in models.items():
        model(images)
        _wait(images)
        meter.start()
        passes, end = 0, time.perf_counter() + seconds
        while passes == 0 or time.perf_counter() < end:
            model(images)
            _wait(images)
            passes += 1
        total = meter.stop()
        joules[name] = None if total is None else 1000 * total / (passes * len(images))
    return joules


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
