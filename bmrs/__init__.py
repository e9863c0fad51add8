"""Threshold-free Bayesian structured pruning (BMRS) for PyTorch."""

from typing import TYPE_CHECKING, Any

from bmrs.lazy import loaded_when_asked

if TYPE_CHECKING:
    from bmrs.public import *  # noqa: F403

    __version__: str
else:
    _load, __dir__ = loaded_when_asked(__name__)

    def __getattr__(name: str) -> Any:
        """Return a public name, or ``__version__``; neither is there before it is asked for."""
        if name != "__version__":
            return _load(name)
        import bmrs_kernels

        return bmrs_kernels.__version__
