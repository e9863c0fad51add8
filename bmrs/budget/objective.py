"""What a budget gives up: of each layer the worth that goes over the worth that stays, squared, and added up.

Worths say what a structure is worth while all others are there, so that their sum is right as long as little goes. A
budget can take most of a layer, and the plain sum would let it: in a chain whose first layer is expensive it leaves one
neuron of a hundred there, and nothing that later layers keep can make up for that. What goes of a layer disturbs what
the next one reads, in proportion to what stays, and the more layers are disturbed the less it matters that one more is:
disturbances that know nothing of each other add up in their squares. The ratio grows without limit where a layer is
emptied, and has no unit, so that scores of layers which are on different scales, as norms of weights are, can be
weighed against each other too. That it is the square was chosen by what networks can do after fine-tuning.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def relative_losses(worths: Floats, staying: float) -> Floats:
    """Return by how much each structure of a group raises the square of the ratio of what goes to what stays.

    Args:
        worths: of the structures in the order in which they go: at least 0 and rising, shape (n,).
        staying: what the structures of the layer are worth that are not among them. The one most worth keeping is.

    Returns:
        At least 0 and rising, shape (n,); infinite where the worth is.
    """
    finite = np.isfinite(worths)
    most = float(worths[finite].max(initial=0.0))
    rest = max(staying, most) if np.isfinite(staying) else most
    # Ratios have no scale, and sums of the largest numbers would overflow.
    its_worths, rest = worths[finite] / (rest or 1.0), float(rest > 0)
    kept = rest + np.append(np.cumsum(its_worths[::-1])[::-1], 0.0)[1:]
    going = np.cumsum(its_worths)
    ratios = np.divide(going, kept, out=np.zeros_like(going), where=going > 0)
    # Rounding must not undo that they rise.
    steps = np.maximum.accumulate(np.maximum(np.diff(ratios**2, prepend=0.0), 0.0))
    return np.append(steps, np.full(int((~finite).sum()), np.inf))
