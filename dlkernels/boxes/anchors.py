"""Anchors on regular grids, as dense detectors place them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AnchorGrid:
    """Anchors of all levels on regular grids.

    Anchor ``a`` of the cell in row ``r`` and column ``c`` of level ``l`` is ``base_anchors[l][a]``
    moved by ``(c + offset) * strides[l]`` in x and ``(r + offset) * strides[l]`` in y, computed in
    float32 in this order.

    Attributes:
        sizes: (height, width) of each level in cells.
        strides: pixels a cell, for each level.
        base_anchors: for each level [A, 4], float32, boxes x1 y1 x2 y2 in pixels around a cell's
            centre; A is the same for all levels.
        offset: the centre of cell (0, 0), in cells: 0.5 puts centres at ``stride / 2``, 0.0 at 0,
            as older detectors do.

    Raises:
        ValueError: levels are missing or differ in number, or a size, a stride or the shape of
            base anchors is impossible.
    """

    sizes: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    base_anchors: tuple[Tensor, ...]
    offset: float = 0.5

    def __post_init__(self) -> None:
        levels = len(self.sizes)
        if levels == 0:
            raise ValueError("sizes must have at least one level, but is empty")
        for name in ("strides", "base_anchors"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} must have one entry per level of sizes, {levels}, "
                    f"but has {len(getattr(self, name))}"
                )
        for size, stride in zip(self.sizes, self.strides, strict=True):
            if len(size) != 2 or min(size) < 0:
                raise ValueError(f"sizes must be (height, width) of each level, but one is {size}")
            if stride <= 0:
                raise ValueError(f"strides must be positive, but one is {stride}")
        for boxes in self.base_anchors:
            if boxes.dim() != 2 or boxes.shape[1] != 4 or boxes.dtype != torch.float32:
                raise ValueError(
                    "base_anchors must be float32 of shape [A, 4] for each level, "
                    f"but one is {list(boxes.shape)} ({boxes.dtype})"
                )
            if boxes.shape != self.base_anchors[0].shape or len(boxes) == 0:
                raise ValueError(
                    "base_anchors must have the same number of anchors, at least one, on every "
                    f"level, but they have {[len(boxes) for boxes in self.base_anchors]}"
                )

    @classmethod
    def from_scales(
        cls,
        sizes: Sequence[tuple[int, int]],
        strides: Sequence[int],
        scales: Sequence[float] = (8,),
        ratios: Sequence[float] = (1.0,),
        offset: float = 0.5,
    ) -> AnchorGrid:
        """Anchors of every ratio and scale, ratios outermost.

        The default, one square anchor of 8 strides a side, is that of ATSS; three octave scales are
        ``[4 * 2 ** (i / 3) for i in range(3)]``, as in RetinaNet.

        Args:
            sizes: (height, width) of each level in cells.
            strides: pixels a cell, for each level.
            scales: side of a square anchor in strides.
            ratios: height over width, at the area of the square.
            offset: see the class.
        """
        base_anchors = []
        for stride in strides:
            boxes = []
            for ratio in ratios:
                for scale in scales:
                    half_width = stride * scale / math.sqrt(ratio) / 2
                    half_height = stride * scale * math.sqrt(ratio) / 2
                    boxes.append((-half_width, -half_height, half_width, half_height))
            base_anchors.append(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
        return cls(tuple(sizes), tuple(strides), tuple(base_anchors), offset)

    @classmethod
    def for_image(
        cls,
        image_size: tuple[int, int],
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        scales: Sequence[float] = (8,),
        ratios: Sequence[float] = (1.0,),
        offset: float = 0.5,
    ) -> AnchorGrid:
        """The grids that cover an image (height, width); see :meth:`from_scales`."""
        height, width = image_size
        sizes = [(-(-height // stride), -(-width // stride)) for stride in strides]
        return cls.from_scales(sizes, strides, scales, ratios, offset)

    @property
    def anchors_per_location(self) -> int:
        """Anchors at each cell."""
        return len(self.base_anchors[0])

    @property
    def num_level_anchors(self) -> tuple[int, ...]:
        """Anchors of each level."""
        return tuple(height * width * self.anchors_per_location for height, width in self.sizes)

    def __len__(self) -> int:
        return sum(self.num_level_anchors)

    def to(self, device: torch.device | str) -> AnchorGrid:
        """The same grid with its base anchors on the device."""
        base_anchors = tuple(boxes.to(device) for boxes in self.base_anchors)
        return AnchorGrid(self.sizes, self.strides, base_anchors, self.offset)

    def boxes(self, device: torch.device | str | None = None) -> Tensor:
        """All anchors x1 y1 x2 y2, [A, 4], in the order level, row, column, base anchor.

        Args:
            device: of the result; that of the base anchors by default.
        """
        levels = []
        for (height, width), stride, base in zip(
            self.sizes, self.strides, self.base_anchors, strict=True
        ):
            base = base.to(device or base.device)
            y = torch.arange(height, dtype=torch.float32, device=base.device) + self.offset
            x = torch.arange(width, dtype=torch.float32, device=base.device) + self.offset
            y, x = torch.meshgrid(y * stride, x * stride, indexing="ij")
            centres = torch.stack((x, y, x, y), -1)
            levels.append((centres[:, :, None] + base).view(-1, 4))
        return torch.cat(levels)

    def inside(self, image_size: tuple[int, int], border: float = 0) -> Tensor:
        """Which anchors lie wholly inside an image (height, width), bool [A].

        Args:
            image_size: (height, width) in pixels.
            border: pixels that an anchor may reach beyond the image on each side.
        """
        height, width = image_size
        x1, y1, x2, y2 = self.boxes().unbind(-1)
        return (x1 >= -border) & (y1 >= -border) & (x2 <= width + border) & (y2 <= height + border)
