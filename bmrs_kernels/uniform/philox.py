"""The counter-based generator Philox4x32-10 in numbers: what the three implementations share.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Uniform number e of a seed is lane e mod 4
of counter e div 4, so the stream depends on the seed and on e alone.
"""

from __future__ import annotations

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
LANES = 4

# The 23 leading bits and half a step: both y and 1 - y are exact in float32, and neither is 0 or 1.
UNIFORM_BITS = 23
