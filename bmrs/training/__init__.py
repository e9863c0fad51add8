"""Training, pruning and measuring the paper's small networks: what the command line does, as functions."""

from typing import TYPE_CHECKING

from bmrs.lazy import loaded_when_asked

if TYPE_CHECKING:
    from bmrs.training.public import *  # noqa: F403
else:
    __getattr__, __dir__ = loaded_when_asked(__name__)
