"""What compaction did to a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bmrs.text_table import table_lines

_MOST_NAMES = 6


@dataclass(frozen=True)
class LayerCompaction:
    """What became of the structures of one noise layer.

    Attributes:
        name: qualified name of the noise layer.
        structures: all its structures.
        pruned: those that its mask prunes, without those given back.
        given_back: pruned ones that were given back, to keep a round number.
        removed: those of them that are gone.
        kept_because: why others of them stay, with zero weights: reasons with numbers of structures.
        folded: whether its factors went into parameters; otherwise one multiplication by them remains.
        not_folded_because: why not; empty if they did.
        noise_kept: with ``keep_noise``, structures that still have noise; else None.
    """

    name: str
    structures: int
    pruned: int
    given_back: int
    removed: int
    kept_because: dict[str, int]
    folded: bool
    not_folded_because: str = ""
    noise_kept: int | None = None


@dataclass(frozen=True)
class NormApproximation:
    """A layer norm that channels left, which ``approximate`` of `bmrs.compact` asked for.

    Attributes:
        name: its qualified name.
        before: channels that it counted.
        after: channels that it counts.
        dropped: whether what the channels that left it added behind it is gone too, as something reads them that has no
            bias to take up its mean.
    """

    name: str
    before: int
    after: int
    dropped: bool


@dataclass(frozen=True)
class Approximated:
    """What compaction approximated, and by how much the outputs differ for it from those of the masked network.

    Attributes:
        norms: the layer norms.
        largest_difference: of outputs on the example, before refitting, relative to the largest magnitude.
        root_mean_square: of the differences, relative to that of the outputs.
    """

    norms: tuple[NormApproximation, ...]
    largest_difference: float
    root_mean_square: float

    def __str__(self) -> str:
        widths = Counter((norm.before, norm.after) for norm in self.norms)
        left = " and ".join(
            f"{number} layer norm{'s' * (number > 1)} lost {before - after} of {before} channels"
            for (before, after), number in widths.items()
        )
        dropped = [norm.name for norm in self.norms if norm.dropped]
        text = (
            f"approximated, as asked: {left} ({_listed([norm.name for norm in self.norms])}), by which outputs differ "
            f"from the masked network's by {self.largest_difference:.1e} of the largest and "
            f"{self.root_mean_square:.1e} in the root mean square"
        )
        if dropped:
            text += f"; what they added behind {_listed(dropped)} is dropped, as no bias takes it up"
        return text


@dataclass(frozen=True)
class CompactReport:
    """What compaction did; ``str()`` gives a text.

    Attributes:
        form: ``"module"``, the user's own classes with narrower layers, or ``"graph"``, a ``torch.fx.GraphModule`` of
            operators, because the user's code cannot run narrower.
        form_because: for ``"graph"``, why.
        layers: an entry for each noise layer.
        parameters_before: values of all parameters without noise.
        parameters_after: the same of the compacted network.
        bytes_before: of parameters and buffers, without noise.
        bytes_after: the same of the compacted network.
        unused: names of parameters that the model does not use in evaluation mode on the example, such as those of
            heads that only training has: they are left at their sizes, even where what they read became smaller.
        flops_before: floating-point operations for the example, two for each multiply-add.
        flops_after: the same of the compacted network.
        error: largest difference of the outputs from the masked network's, relative to the largest output; where
            something was approximated, from the masked network's with that approximated.
        compared_in: what these outputs were computed in, as text.
        emptied: names of layers that nothing is left of, as of a residual branch of which all structures are pruned:
            they lost their weights, and what the branch adds is a constant.
        approximated: what ``approximate`` let leave and how much the outputs differ for it; None if nothing.
        only_in_training: for ``"graph"``, what was seen that the user's code does in training mode and the graph does
            not: random numbers of torch other than dropout's, buffers that change, outputs.
        fails_in_training: the error that ``"module"`` ends in in training mode and the masked model does not, where
            parts that evaluation mode does not use kept sizes that no longer fit; "" if there is none.
    """

    form: str
    form_because: str
    layers: tuple[LayerCompaction, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    unused: tuple[str, ...]
    flops_before: int
    flops_after: int
    error: float
    compared_in: str
    emptied: tuple[str, ...] = ()
    approximated: Approximated | None = None
    only_in_training: tuple[str, ...] = ()
    fails_in_training: str = ""

    @property
    def pruned(self) -> int:
        """Structures that masks prune, over all layers."""
        return sum(layer.pruned for layer in self.layers)

    @property
    def removed(self) -> int:
        """Structures that are gone, over all layers."""
        return sum(layer.removed for layer in self.layers)

    @property
    def paper_compression(self) -> float:
        """What the paper calls "compression %": pruned structures in percent, whether or not they could be removed."""
        structures = sum(layer.structures for layer in self.layers)
        return 100.0 * self.pruned / structures if structures else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, ready for JSON."""
        return {
            **asdict(self),
            "layers": [asdict(layer) for layer in self.layers],
            "pruned": self.pruned,
            "removed": self.removed,
            "paper_compression": self.paper_compression,
        }

    def __str__(self) -> str:
        header = ("layer", "structures", "pruned", "removed", "kept")
        rows = [
            (
                layer.name or "(model)",
                *map(str, (layer.structures, layer.pruned, layer.removed, layer.pruned - layer.removed)),
            )
            for layer in self.layers
        ]
        lines = table_lines([header, *rows], left=0)
        for what, before, after in (
            ("parameters", self.parameters_before, self.parameters_after),
            ("bytes", self.bytes_before, self.bytes_after),
            ("FLOPs", self.flops_before, self.flops_after),
        ):
            lines.append(f"{what}: {before:,} before, {after:,} after ({_percent(before, after)})")
        if self.approximated is None:
            lines.append(f"outputs differ by {self.error:.1e} of the largest, in {self.compared_in}")
        else:
            lines.append(str(self.approximated))
            lines.append(
                f"apart from that outputs differ by {self.error:.1e} of the largest, in {self.compared_in}"
            )
        for layer in self.layers:
            name = layer.name or "(model)"
            lines += [
                f"{name}: {number} pruned, but kept with zero weights: {reason}"
                for reason, number in layer.kept_because.items()
            ]
            if layer.given_back:
                lines.append(f"{name}: {layer.given_back} given back, to keep a round number")
            if layer.noise_kept is not None:
                lines.append(f"{name}: the noise of {layer.noise_kept} structures stays, as keep_noise asks")
            elif not layer.folded:
                lines.append(f"{name}: one multiplication by its factors remains: {layer.not_folded_because}")
        if self.emptied:
            lines.append(f"nothing is left of these, what they add is a constant: {', '.join(self.emptied)}")
        if self.unused:
            lines.append(f"not used in evaluation mode, left as they are: {', '.join(self.unused)}")
        if self.form == "graph":
            lines.append(f"a graph of operators instead of the model's own classes: {self.form_because}")
        if self.only_in_training:
            lines.append(f"in training mode the graph lacks {'; '.join(self.only_in_training)}")
        if self.fails_in_training:
            lines.append(f"in training mode it ends in an error: {self.fails_in_training}")
        return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _percent(before: int, after: int) -> str:
    return f"{100 * after / before:.1f} %" if before else "no change"
