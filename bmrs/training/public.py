"""The public names of `bmrs.training`, which offers them."""

from bmrs.training.config import TrainConfig
from bmrs.training.finite import NonFiniteError
from bmrs.training.interruption import InterruptedRunError
from bmrs.training.options import ConfigError
from bmrs.training.recipe import CollapseError
from bmrs.training.run import evaluate, resume, train
from bmrs.training.run_folder import RunError

__all__ = [
    "CollapseError",
    "ConfigError",
    "InterruptedRunError",
    "NonFiniteError",
    "RunError",
    "TrainConfig",
    "evaluate",
    "resume",
    "train",
]
