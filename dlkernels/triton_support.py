"""What the Triton launchers of several families share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile.
TILE = 1024


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


@triton.jit
def relu(z):
    """Not tl.maximum: NaN must stay NaN."""
    return tl.where(z < 0, 0.0, z)


@triton.jit
def strides_of_maps(channels, area, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Strides of channel and pixel, and the extents, the contiguous one known to be aligned."""
    if CHANNELS_LAST:
        channels = channels // ALIGNMENT * ALIGNMENT
        return 1, channels, channels, area
    area = area // ALIGNMENT * ALIGNMENT
    return area, 1, channels, area


class MapTiles:
    """How a batch of maps, seen as [N, channels, area] in either layout, is cut into tiles.

    Attributes:
        samples: N.
        channels: C.
        area: H * W.
        longest: pixels that one program of a reduction passes over, at most.
        stretch: pixels of a sample that it passes over.
        splits: such stretches of a sample.
        c_blocks: tiles along the channels.
        a_blocks: tiles along the area.
        options: of the kernels.
    """

    def __init__(
        self,
        x: Tensor,
        shape: Sequence[int] | None = None,
        tile: int = TILE,
        steps: int | None = None,
    ):
        """Tiles of maps that lie in memory as ``x`` does and have its shape, or another one."""
        self.samples, self.channels, height, width = x.shape if shape is None else shape
        self.area = height * width
        channels_last = not x.is_contiguous()
        inner = self.channels if channels_last else self.area
        outer = self.area if channels_last else self.channels
        # Rows of 128 channels stream as well as longer ones, and give more programs.
        widest = min(128, tile) if channels_last else tile
        inner_block = min(triton.next_power_of_2(max(1, inner)), widest)
        outer_block = min(triton.next_power_of_2(max(1, outer)), tile // inner_block)
        blocks = (inner_block, outer_block) if channels_last else (outer_block, inner_block)
        block_c, block_a = blocks
        self.longest = (steps or (16 if channels_last else 8)) * block_a
        self.splits = max(1, triton.cdiv(self.area, self.longest))
        self.c_blocks = triton.cdiv(self.channels, block_c)
        self.a_blocks = triton.cdiv(self.area, block_a)
        self.stretch = min(self.longest, self.a_blocks * block_a)
        self.options: dict[str, Any] = {
            "CHANNELS_LAST": channels_last,
            "ALIGNMENT": alignment_of(inner),
            "BLOCK_C": block_c,
            "BLOCK_A": block_a,
        }

    @property
    def tiles(self) -> int:
        """Of the whole batch."""
        return self.samples * self.c_blocks * self.a_blocks
