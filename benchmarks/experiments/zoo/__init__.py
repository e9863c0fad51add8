"""Small versions of the architectures that people use, to try compaction on.

Every entry builds a network with random weights and fewer than 300 000 parameters, makes inputs for it, and says
where noise goes so that pruned structures can be removed: hidden units of feed-forward blocks, inner channels of
residual blocks, batch norms of plain convolutional networks. The networks are written plainly, the way their authors
or the usual libraries write them, because compaction has to cope with how people write forward passes.
"""

from __future__ import annotations

from benchmarks.experiments.zoo.attention import attention_networks
from benchmarks.experiments.zoo.convolutional import convolutional_networks
from benchmarks.experiments.zoo.entry import Entry
from benchmarks.experiments.zoo.images import image_networks
from benchmarks.experiments.zoo.residual import residual_networks
from benchmarks.experiments.zoo.sequences import sequence_networks
from benchmarks.experiments.zoo.transformers_library import library_decoders, library_encoders
from benchmarks.experiments.zoo.unusual import unusual_networks

__all__ = ["ENTRIES", "Entry"]

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for family in (
        residual_networks,
        convolutional_networks,
        image_networks,
        attention_networks,
        library_encoders,
        library_decoders,
        sequence_networks,
        unusual_networks,
    )
    for entry in family()
}
"""Every network by its name."""
