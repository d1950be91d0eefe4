"""What the Triton launchers of several families share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Budget:
    """What the machine code of a kernel may use; a kernel must never spill.

    Attributes:
        registers: at most, per thread.
        shared: bytes of shared memory at most, per program.
        wide: the least share of global loads and stores that are 128 bits wide, for aligned maps.
    """

    registers: int
    shared: int
    wide: float = 0.0


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Launches a kernel on a one-dimensional grid; an empty grid is no launch."""
    if programs > 0:
        kernel[(programs,)](*args, **options)


def alignment_of(extent: int) -> int:
    """The largest power of two up to 16 that divides the extent."""
    return math.gcd(extent, 16)
