"""YOLOv4: CSPDarknet53, spatial pyramid pooling, path aggregation, and YOLO heads.

Bochkovskiy, Wang and Liao, "YOLOv4: Optimal Speed and Accuracy of Object Detection" (2020). The
network is that of the published ``yolov4.cfg``: its modules stand in the order of the layers there,
so that :func:`dlkernels.models.detection.darknet.load_weights` reads published weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dlkernels.models.detection.conv_block import (
    ConvBlock,
    Maps,
    Output,
    Residual,
    alternating,
    concatenated,
    enlarged,
    scaled,
)
from dlkernels.models.detection.post_processing import PostProcessing
from dlkernels.models.detection.yolo_head import YOLO, Anchors, LossWeights
from dlkernels.pyramid_pool.op import pyramid_pool

ANCHORS = (
    ((12, 16), (19, 36), (40, 28)),
    ((36, 75), (76, 55), (72, 146)),
    ((142, 110), (192, 243), (459, 401)),
)
SCALE_XY = (1.2, 1.1, 1.05)
BLOCKS = (1, 2, 8, 8, 4)


class YOLOv4(YOLO):
    """YOLOv4 of any width and depth; see :class:`YOLO` for its outputs and the other arguments.

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
        scale_xy: Sequence[float] = SCALE_XY,
        ignore_iou: float = 0.7,
        shape_iou: float = 0.213,
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
        self.backbone = CSPDarknet53(width, depth)
        self.neck = PANet(self.backbone.channels, self)

    def raw_outputs(self, batch: Tensor) -> list[Tensor]:
        """Maps of the three levels for a batch [N, 3, H, W] that the transform has prepared."""
        return self.neck(*self.backbone(batch))


class CSPDarknet53(nn.Module):
    """The backbone: maps at 1/8, 1/16 and 1/32 of the images' size.

    Args:
        width: factor of all numbers of channels.
        depth: factor of the numbers of residual blocks; a stage has at least one.
    """

    def __init__(self, width: float = 1.0, depth: float = 1.0):
        super().__init__()
        widths = [scaled(32 << stage, width) for stage in range(6)]
        self.channels = tuple(widths[-3:])
        self.stem = ConvBlock(3, widths[0], 3)
        self.stages = nn.ModuleList(
            CSPStage(
                widths[stage], widths[stage + 1], max(1, round(blocks * depth)), first=stage == 0
            )
            for stage, blocks in enumerate(BLOCKS)
        )

    def forward(self, images: Tensor) -> list[Maps]:
        """The maps of images [N, 3, H, W], the finest first."""
        x, maps = self.stem(Maps(images)), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[-3:]


class CSPStage(nn.Module):
    """A strided convolution, and residual blocks on one of two parts of its result.

    Wang et al., "CSPNet: A New Backbone that can Enhance Learning Capability of CNN" (2020),
    figure 3 (b). The first stage does not halve the parts' channels.

    Args:
        in_channels: of the input.
        channels: of the output.
        blocks: how many residual blocks.
        first: whether this is the network's first stage.
    """

    def __init__(self, in_channels: int, channels: int, blocks: int, first: bool = False):
        super().__init__()
        part = channels if first else channels // 2
        self.down = ConvBlock(in_channels, channels, 3, 2)
        self.bypass = ConvBlock(channels, part)
        self.enter = ConvBlock(channels, part)
        self.blocks = nn.Sequential(
            *(Residual(part, channels // 2 if first else part) for _ in range(blocks))
        )
        self.leave = ConvBlock(part, part)
        self.merge = ConvBlock(2 * part, channels)

    def forward(self, x: Maps) -> Maps:
        """Maps [N, in_channels, H, W] to [N, channels, H / 2, W / 2]."""
        x = self.down(x)
        bypass = self.bypass(x)
        inner = self.leave(self.blocks(self.enter(x)))
        return self.merge(concatenated(inner, bypass))


class PANet(nn.Module):
    """Pyramid pooling, a path from coarse to fine and one back, and the heads.

    Liu et al., "Path Aggregation Network for Instance Segmentation" (2018), with concatenation in
    place of sums: YOLOv4, section 3.4.

    Args:
        channels: of the backbone's maps, the finest first.
        detector: makes the last convolutions.
    """

    def __init__(self, channels: Sequence[int], detector: YOLO):
        super().__init__()
        fine, middle, coarse = (count // 2 for count in channels)

        def convs(in_channels: int, hidden: int, count: int) -> nn.Sequential:
            return alternating(in_channels, hidden, count, "leaky_relu")

        def conv(in_channels: int, out: int, kernel: int = 1, stride: int = 1) -> ConvBlock:
            return ConvBlock(in_channels, out, kernel, stride, "leaky_relu")

        def head(width: int) -> Output:
            return Output(width, detector.output_convolution(2 * width))

        self.before_pool = convs(2 * coarse, coarse, 3)
        self.after_pool = convs(4 * coarse, coarse, 3)
        self.narrow_coarse = conv(coarse, middle)
        self.lateral_middle = conv(2 * middle, middle)
        self.up_middle = convs(2 * middle, middle, 5)
        self.narrow_middle = conv(middle, fine)
        self.lateral_fine = conv(2 * fine, fine)
        self.up_fine = convs(2 * fine, fine, 5)
        self.head_fine = head(fine)
        self.shrink_fine = conv(fine, middle, 3, 2)
        self.down_middle = convs(2 * middle, middle, 5)
        self.head_middle = head(middle)
        self.shrink_middle = conv(middle, coarse, 3, 2)
        self.down_coarse = convs(2 * coarse, coarse, 5)
        self.head_coarse = head(coarse)

    def forward(self, fine: Maps, middle: Maps, coarse: Maps) -> list[Tensor]:
        """The backbone's maps to raw outputs, the finest first."""
        coarse = self.after_pool(Maps(pyramid_pool(self.before_pool(coarse).value)))
        above = enlarged(self.narrow_coarse(coarse))
        middle = self.up_middle(concatenated(self.lateral_middle(middle), above))
        above = enlarged(self.narrow_middle(middle))
        fine = self.up_fine(concatenated(self.lateral_fine(fine), above))
        middle = self.down_middle(concatenated(self.shrink_fine(fine), middle))
        coarse = self.down_coarse(concatenated(self.shrink_middle(middle), coarse))
        return [self.head_fine(fine), self.head_middle(middle), self.head_coarse(coarse)]
