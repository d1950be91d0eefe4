"""YOLOv3 with adaptively spatial feature fusion.

Redmon and Farhadi, "YOLOv3: An Incremental Improvement" (2018); Liu, Huang and Wang, "Learning
Spatial Fusion for Single-Shot Object Detection" (2019).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dlkernels.asff.modules import ASFF
from dlkernels.models.detection.conv_block import (
    ConvBlock,
    Maps,
    Residual,
    alternating,
    concatenated,
    enlarged,
    scaled,
)
from dlkernels.models.detection.post_processing import PostProcessing
from dlkernels.models.detection.yolo_head import YOLO, Anchors, LossWeights

ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
BLOCKS = (1, 2, 8, 8, 4)
ACTIVATION = "leaky_relu"


class YOLOv3ASFF(YOLO):
    """YOLOv3 whose levels are fused before each head; see :class:`YOLO` for the other arguments.

    Args:
        num_classes: number of classes.
        width: factor of all numbers of channels.
        depth: factor of the numbers of residual blocks.
    """

    def __init__(
        self,
        num_classes: int = 80,
        *,
        width: float = 1.0,
        depth: float = 1.0,
        anchors: Anchors = ANCHORS,
        scale_xy: Sequence[float] = (1.0, 1.0, 1.0),
        ignore_iou: float = 0.5,
        shape_iou: float = 1.0,
        loss_weights: LossWeights | None = None,
        post_processing: PostProcessing | None = None,
        min_size: int | Sequence[int] = 608,
        max_size: int = 608,
        image_mean: Sequence[float] = (0.0, 0.0, 0.0),
        image_std: Sequence[float] = (1.0, 1.0, 1.0),
    ):
        super().__init__(
            num_classes,
            anchors=anchors,
            scale_xy=scale_xy,
            ignore_iou=ignore_iou,
            shape_iou=shape_iou,
            loss_weights=loss_weights,
            post_processing=post_processing,
            min_size=min_size,
            max_size=max_size,
            image_mean=image_mean,
            image_std=image_std,
        )
        self.backbone = Darknet53(width, depth)
        self.neck = Pyramid(self.backbone.channels)
        widths = self.neck.channels[::-1]
        outs = self.backbone.channels[::-1]
        self.fusions = nn.ModuleList(
            ASFF(level, widths, out_channels=outs[level]) for level in (2, 1, 0)
        )
        self.heads = nn.ModuleList(self.output_convolution(out) for out in outs[::-1])

    def raw_outputs(self, batch: Tensor) -> list[Tensor]:
        """Maps of the three levels for a batch [N, 3, H, W] that the transform has prepared."""
        coarse_to_fine = self.neck(*self.backbone(batch))[::-1]
        return [
            head(fuse(*coarse_to_fine)) for fuse, head in zip(self.fusions, self.heads, strict=True)
        ]


class Darknet53(nn.Module):
    """The backbone (YOLOv3, table 1): maps at 1/8, 1/16 and 1/32 of the images' size.

    Args:
        width: factor of all numbers of channels.
        depth: factor of the numbers of residual blocks; a stage has at least one.
    """

    def __init__(self, width: float = 1.0, depth: float = 1.0):
        super().__init__()
        widths = [scaled(32 << stage, width) for stage in range(6)]
        self.channels = tuple(widths[-3:])
        self.stem = ConvBlock(3, widths[0], 3, activation=ACTIVATION)
        self.stages = nn.ModuleList()
        for stage, blocks in enumerate(BLOCKS):
            channels = widths[stage + 1]
            down = ConvBlock(widths[stage], channels, 3, 2, ACTIVATION)
            count = max(1, round(blocks * depth))
            residuals = (Residual(channels, channels // 2, ACTIVATION) for _ in range(count))
            self.stages.append(nn.Sequential(down, *residuals))

    def forward(self, images: Tensor) -> list[Maps]:
        """The maps of images [N, 3, H, W], the finest first."""
        x, maps = self.stem(Maps(images)), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[-3:]


class Pyramid(nn.Module):
    """The neck of YOLOv3: each level gets what the coarser ones found.

    Args:
        channels: of the backbone's maps, the finest first. The neck's have half as many, the
            finest as many.
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        fine, middle, coarse = (count // 2 for count in channels)
        self.channels = (2 * fine, middle, coarse)
        self.coarse = alternating(2 * coarse, coarse, 5, ACTIVATION)
        self.narrow_coarse = ConvBlock(coarse, middle, activation=ACTIVATION)
        self.middle = alternating(3 * middle, middle, 5, ACTIVATION)
        self.narrow_middle = ConvBlock(middle, fine, activation=ACTIVATION)
        # The fusion takes the finest level before its last reduction.
        self.fine = alternating(3 * fine, fine, 4, ACTIVATION)

    def forward(self, fine: Maps, middle: Maps, coarse: Maps) -> tuple[Tensor, ...]:
        """The backbone's maps to as many, the finest first."""
        coarse = self.coarse(coarse)
        middle = self.middle(concatenated(enlarged(self.narrow_coarse(coarse)), middle))
        fine = self.fine(concatenated(enlarged(self.narrow_middle(middle)), fine))
        return fine.value, middle.value, coarse.value
