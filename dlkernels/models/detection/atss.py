"""ATSS: one anchor per location, and label assignment that adapts to each object.

Zhang, Chi, Yao, Lei and Li, "Bridging the Gap Between Anchor-based and Anchor-free Detection via
Adaptive Training Sample Selection" (2020). Anchors, box coding and losses are those of
mmdetection's ATSS, whose checkpoints load through :func:`from_mmdetection`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models import resnet50
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from dlkernels import ops
from dlkernels.boxes.anchors import AnchorGrid
from dlkernels.boxes.coding import centerness_targets, decode_deltas, encode_distances
from dlkernels.checks import check_choice
from dlkernels.conv3x3.modules import Conv2d
from dlkernels.models.detection.backbone import Backbone
from dlkernels.models.detection.detector import Detector, Size, Target
from dlkernels.models.detection.distributed import shared_normaliser
from dlkernels.models.detection.post_processing import PostProcessing

STRIDES = (8, 16, 32, 64, 128)
DELTA_STDS = (0.1, 0.1, 0.2, 0.2)
BOX_LOSS_WEIGHT = 2.0
PRIOR_PROBABILITY = 0.01  # of each class at the start of training: focal loss, section 4.1

# RetinaNet gives every box an anchor, however little they overlap.
ASSIGNERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "atss": ops.atss_assign,
    "max_iou": partial(ops.max_iou_assign, low_quality=True),
    "fcos": ops.fcos_assign,
}


class Outputs(NamedTuple):
    """Raw outputs: a map for each level, the finest first.

    Attributes:
        class_logits: [N, num_classes, H, W].
        box_deltas: [N, 4, H, W].
        centerness: logits, [N, 1, H, W].
    """

    class_logits: list[Tensor]
    box_deltas: list[Tensor]
    centerness: list[Tensor]


class Predictions(NamedTuple):
    """Decoded outputs of A anchors, the finest level first: row by row.

    Attributes:
        boxes: x1 y1 x2 y2 in pixels, float32 [N, A, 4].
        scores: probabilities times centerness, float32 [N, A, num_classes].
        probabilities: of each class, float32 [N, A, num_classes].
    """

    boxes: Tensor
    scores: Tensor
    probabilities: Tensor


class ATSS(Detector):
    """ResNet and feature pyramid, P3 to P7, with a head that all levels share.

    See :class:`Detector` for how it is called. The score of a detection is the probability of its
    class times its centerness; the threshold is on the former.

    Args:
        num_classes: number of classes.
        backbone: by default torchvision's ResNet-50 with random weights.
        channels: of the pyramid and the head, a multiple of 8.
        stacked_convs: convolutions of each branch of the head before its last.
        assigner: which anchors are positive: ``"atss"``, ``"max_iou"`` (RetinaNet) or ``"fcos"``.
        anchor_scale: side of an anchor in strides of its level.
        post_processing: which predictions become detections.
        min_size: the shorter side that images are resized to, in pixels; of several, one is drawn
            for each image in training, and the last is that of evaluation.
        max_size: the most that the longer side may have.
        image_mean: of each colour channel.
        image_std: of each colour channel.

    Raises:
        ValueError: a number or name is out of range.
    """

    def __init__(
        self,
        num_classes: int = 80,
        backbone: Backbone | None = None,
        *,
        channels: int = 256,
        stacked_convs: int = 4,
        assigner: str = "atss",
        anchor_scale: float = 8.0,
        post_processing: PostProcessing | None = None,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        sizes = (min_size,) if isinstance(min_size, int) else tuple(min_size)
        super().__init__(
            num_classes,
            GeneralizedRCNNTransform(sizes, max_size, list(image_mean), list(image_std)),
        )
        check_choice("assigner", assigner, ASSIGNERS)
        if channels < 8 or channels % 8 != 0:
            raise ValueError(f"channels must be a positive multiple of 8, but is {channels}")
        if not anchor_scale > 0:
            raise ValueError(f"anchor_scale must be above 0, but is {anchor_scale}")
        self.assigner = assigner
        self.anchor_scale = anchor_scale
        self.post_processing = post_processing or PostProcessing()
        self.backbone = backbone or Backbone.of(resnet50(weights=None))
        self.neck = FeaturePyramidNetwork(
            list(self.backbone.channels), channels, CoarserLevels(channels)
        )
        self.head = Head(channels, num_classes, stacked_convs)

    def raw_outputs(self, batch: Tensor) -> Outputs:
        """What the network predicts for a batch [N, 3, H, W] that the transform has prepared."""
        maps = self.backbone(batch)
        pyramid = self.neck({str(level): x for level, x in enumerate(maps)})
        return self.head(list(pyramid.values()))

    def loss(
        self, outputs: Outputs, targets: Sequence[Target], image_sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        """The three losses of the paper; see :meth:`Detector.loss` for the arguments.

        Returns:
            ``loss_class``, the focal loss, and ``loss_centerness``, a binary cross entropy, over
            the number of positive anchors of the batch; ``loss_box``, the GIoU loss weighted by
            the centerness that each location should have, over the sum of these weights. Anchors
            outside their image have no loss. In several processes, number and sum are those of all
            of them: see :func:`shared_normaliser`.
        """
        logits, deltas, centerness = (_by_anchor(maps) for maps in outputs)
        grid = self._anchor_grid(outputs)
        anchors = grid.boxes(logits.device)
        gt_boxes = [target["boxes"].float() for target in targets]
        valid = _located_inside(anchors, image_sizes)
        assigned, _ = ASSIGNERS[self.assigner](grid, None, gt_boxes, valid=valid)

        image, anchor = (assigned >= 0).nonzero(as_tuple=True)
        gt = assigned[image, anchor]
        num_positive = shared_normaliser(logits.new_tensor(len(gt), dtype=torch.float32))
        labels = torch.full_like(assigned, -1)
        labels[image, anchor] = _padded([target["labels"] for target in targets])[image, gt]
        counted = (valid & (assigned != -2)).float()
        loss_class = ops.sigmoid_focal_loss(logits, labels, weight=counted, reduction="sum")

        positive_anchors, box = anchors[anchor], _padded(gt_boxes)[image, gt]
        location = (positive_anchors[:, :2] + positive_anchors[:, 2:]) / 2
        centerness_target = centerness_targets(encode_distances(location, box))
        predicted = decode_deltas(positive_anchors, deltas[image, anchor].float(), stds=DELTA_STDS)
        loss_box = ops.box_iou_loss(predicted, box, "giou") * centerness_target
        total_weight = shared_normaliser(centerness_target.sum())
        loss_centerness = F.binary_cross_entropy_with_logits(
            centerness[image, anchor, 0].float(), centerness_target, reduction="sum"
        )
        return {
            "loss_class": loss_class / num_positive,
            "loss_box": BOX_LOSS_WEIGHT * loss_box.sum() / total_weight,
            "loss_centerness": loss_centerness / num_positive,
        }

    def decode(self, outputs: Outputs) -> Predictions:
        """Boxes and scores of raw outputs: all that comes before the suppression."""
        logits, deltas, centerness = (_by_anchor(maps).float() for maps in outputs)
        anchors = self._anchor_grid(outputs).boxes(logits.device)
        probabilities = logits.sigmoid()
        boxes = decode_deltas(anchors, deltas, stds=DELTA_STDS)
        return Predictions(boxes, probabilities * centerness.sigmoid(), probabilities)

    def get_bboxes(self, outputs: Outputs, image_sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        """The detections in raw outputs; see :meth:`Detector.get_bboxes`."""
        boxes, scores, probabilities = self.decode(outputs)
        levels = self._anchor_grid(outputs).num_level_anchors
        starts = [sum(levels[:level]) for level in range(len(levels))]
        detections = []
        for image, size in enumerate(image_sizes):
            chosen = []
            for start, count in zip(starts, levels, strict=True):
                level = slice(start, start + count)
                anchor, label = self.post_processing.candidates(
                    scores[image, level], probabilities[image, level]
                )
                chosen.append(torch.stack((anchor + start, label)))
            anchor, label = torch.cat(chosen, 1)
            score = scores[image, anchor, label]
            detections.append(
                self.post_processing.suppress(boxes[image, anchor], score, label, size)
            )
        return detections

    def _anchor_grid(self, outputs: Outputs) -> AnchorGrid:
        """A square anchor around the upper left corner of each cell."""
        sizes = [(x.shape[2], x.shape[3]) for x in outputs.class_logits]
        return AnchorGrid.from_scales(sizes, STRIDES, (self.anchor_scale,), offset=0.0)


class CoarserLevels(ExtraFPNBlock):
    """P6 from P5 and P7 from P6, a strided convolution each and no activation between them."""

    def __init__(self, channels: int):
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(2)]
        for conv in convs:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.get_parameter("bias"))
        self.convs = nn.ModuleList(convs)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Adds two maps to the pyramid's."""
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            results.append(_halved(results[-1], conv))
            names.append(f"coarser{len(names)}")
        return results, names


def _halved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution of kernel 3, stride 2 and padding 1.

    Of maps one pixel wide without its stride: oneDNN finds the weight's gradient of such a strided
    convolution of bfloat16 from memory that was never written (torch 2.14, AVX-512).
    """
    if x.shape[3] > 1:
        halved: Tensor = conv(x)
        return halved
    return F.conv2d(x, conv.weight, conv.bias, padding=1)[:, :, ::2, ::2]


class Head(nn.Module):
    """Two branches of convolutions with group norm, which all levels share.

    Args:
        channels: of the maps, a multiple of 8; a group has 8.
        num_classes: number of classes.
        stacked_convs: convolutions of each branch before its last.
    """

    def __init__(self, channels: int, num_classes: int, stacked_convs: int):
        super().__init__()
        self.class_branch = _branch(channels, stacked_convs)
        self.box_branch = _branch(channels, stacked_convs)
        self.class_logits = Conv2d(channels, num_classes, 3, padding=1)
        self.box_deltas = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in STRIDES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        prior_logit = math.log(PRIOR_PROBABILITY / (1 - PRIOR_PROBABILITY))
        nn.init.constant_(self.class_logits.get_parameter("bias"), prior_logit)

    def forward(self, maps: Sequence[Tensor]) -> Outputs:
        """Maps [N, channels, H, W] of the five levels to raw outputs."""
        outputs = Outputs([], [], [])
        for x, scale in zip(maps, self.scales, strict=True):
            box_features = self.box_branch(x)
            outputs.class_logits.append(self.class_logits(self.class_branch(x)))
            outputs.box_deltas.append(self.box_deltas(box_features) * scale)
            outputs.centerness.append(self.centerness(box_features))
        return outputs


def _branch(channels: int, convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convs):
        layers += [
            Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(channels // 8, channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def _by_anchor(maps: Sequence[Tensor]) -> Tensor:
    """Maps [N, C, H, W] of all levels as [N, A, C], in the order of the anchors."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)


def _padded(tensors: list[Tensor]) -> Tensor:
    return pad_sequence(tensors, batch_first=True)


def _located_inside(anchors: Tensor, image_sizes: Sequence[Size]) -> Tensor:
    """Which anchors' locations lie in their image and not in its padding, bool [B, A]."""
    location = (anchors[:, :2] + anchors[:, 2:]) / 2
    sizes = anchors.new_tensor([(width, height) for height, width in image_sizes])
    return (location < sizes[:, None]).all(-1)


# ---- checkpoints --------------------------------------------------------------------------------

_KEYS = (
    (r"backbone\.", r"backbone.body."),
    (r"neck\.lateral_convs\.(\d)\.conv\.", r"neck.inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.([012])\.conv\.", r"neck.layer_blocks.\1.0."),
    (r"neck\.fpn_convs\.3\.conv\.", r"neck.extra_blocks.convs.0."),
    (r"neck\.fpn_convs\.4\.conv\.", r"neck.extra_blocks.convs.1."),
    (r"bbox_head\.atss_cls\.", r"head.class_logits."),
    (r"bbox_head\.atss_reg\.", r"head.box_deltas."),
    (r"bbox_head\.atss_centerness\.", r"head.centerness."),
    (r"bbox_head\.scales\.(\d)\.scale", r"head.scales.\1"),
)
_BRANCH_KEY = re.compile(r"bbox_head\.(cls|reg)_convs\.(\d)\.(conv|gn)\.(.+)")


def from_mmdetection(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turns a checkpoint of mmdetection's ATSS with a ResNet into a state dict of :class:`ATSS`.

    Args:
        checkpoint: what mmdetection saves, or the ``state_dict`` in it.

    Raises:
        ValueError: a key belongs to no ATSS with a ResNet.
    """
    state_dict = checkpoint.get("state_dict", checkpoint)
    return {_renamed(key): value for key, value in state_dict.items()}


def _renamed(key: str) -> str:
    branch = _BRANCH_KEY.fullmatch(key)
    if branch:
        name = "class_branch" if branch[1] == "cls" else "box_branch"
        layer = 3 * int(branch[2]) + ("conv", "gn").index(branch[3])
        return f"head.{name}.{layer}.{branch[4]}"
    for pattern, replacement in _KEYS:
        renamed, found = re.subn(rf"^{pattern}", replacement, key)
        if found:
            return renamed
    raise ValueError(f"checkpoint must be of mmdetection's ATSS, but has the key {key!r}")
