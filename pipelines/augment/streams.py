"""Streams of `pipelines.crng` for the transforms of this package; `crng` itself uses 0, 1 and 6.

Numbers once used keep their meaning: changing one changes every run that is repeated from its seed.
"""

from __future__ import annotations

RAND_AUGMENT, THREE_AUGMENT, ERASING, ERASING_NOISE = 2, 3, 4, 5
