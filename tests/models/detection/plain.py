"""ATSS in plain PyTorch: a network with mmdetection's names, losses and detections in loops."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18
from torchvision.ops import box_iou, nms

from tests.atss.cases import published

STRIDES = (8, 16, 32, 64, 128)


# ---- the network --------------------------------------------------------------------------------


class ConvModule(nn.Module):
    def __init__(self, channels_in, channels, kernel, stride=1, groups=None):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, bias=not groups)
        if groups:
            self.gn = nn.GroupNorm(groups, channels)

    def forward(self, x):
        x = self.conv(x)
        return F.relu(self.gn(x)) if hasattr(self, "gn") else x


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return x * self.scale


class Neck(nn.Module):
    def __init__(self, channels_in, channels):
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(c, channels, 1) for c in channels_in)
        self.fpn_convs = nn.ModuleList(
            ConvModule(channels, channels, 3, stride) for stride in (1, 1, 1, 2, 2)
        )

    def forward(self, c3, c4, c5):
        p3, p4, p5 = (conv(x) for conv, x in zip(self.lateral_convs, (c3, c4, c5), strict=True))
        p4 = p4 + F.interpolate(p5, size=p4.shape[2:])
        p3 = p3 + F.interpolate(p4, size=p3.shape[2:])
        p3, p4, p5 = (self.fpn_convs[i](x) for i, x in enumerate((p3, p4, p5)))
        p6 = self.fpn_convs[3](p5)
        return p3, p4, p5, p6, self.fpn_convs[4](p6)


class BoxHead(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.cls_convs, self.reg_convs = (
            nn.ModuleList(ConvModule(channels, channels, 3, 1, channels // 8) for _ in range(4))
            for _ in range(2)
        )
        self.atss_cls = nn.Conv2d(channels, classes, 3, padding=1)
        self.atss_reg = nn.Conv2d(channels, 4, 3, padding=1)
        self.atss_centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in STRIDES)

    def forward(self, x, level):
        classes = boxes = x
        for conv in self.cls_convs:
            classes = conv(classes)
        for conv in self.reg_convs:
            boxes = conv(boxes)
        deltas = self.scales[level](self.atss_reg(boxes))
        return self.atss_cls(classes), deltas, self.atss_centerness(boxes)


class PlainATSS(nn.Module):
    """ATSS with a ResNet-18; state-dict keys as mmdetection has them."""

    def __init__(self, classes, channels):
        super().__init__()
        self.backbone = resnet18(weights=None)
        del self.backbone.fc
        self.neck = Neck((128, 256, 512), channels)
        self.bbox_head = BoxHead(channels, classes)

    def forward(self, x):
        net = self.backbone
        x = net.layer1(net.maxpool(F.relu(net.bn1(net.conv1(x)))))
        c3 = net.layer2(x)
        c4 = net.layer3(c3)
        levels = enumerate(self.neck(c3, c4, net.layer4(c4)))
        return tuple(zip(*(self.bbox_head(x, level) for level, x in levels), strict=True))


# ---- anchors ------------------------------------------------------------------------------------


def plain_anchors(maps):
    """Anchors [A, 4], and how many each level has."""
    anchors, counts = [], []
    for x, stride in zip(maps, STRIDES, strict=True):
        height, width = x.shape[2:]
        for row in range(height):
            for column in range(width):
                anchors.append([(column - 4) * stride, (row - 4) * stride] * 2)
                anchors[-1][2] += 8 * stride
                anchors[-1][3] += 8 * stride
        counts.append(height * width)
    return torch.tensor(anchors, dtype=torch.float32), counts


def of_image(maps, image):
    """Maps of all levels as rows [A, C] of one image."""
    return torch.cat([x[image].permute(1, 2, 0).reshape(-1, x.shape[1]) for x in maps])


def decoded(anchors, deltas):
    size = anchors[:, 2:] - anchors[:, :2]
    center = (anchors[:, 2:] + anchors[:, :2]) / 2 + 0.1 * deltas[:, :2] * size
    size = size * (0.2 * deltas[:, 2:]).exp()
    return torch.cat((center - size / 2, center + size / 2), 1)


# ---- assigners: the index of a box, -1 for none, -2 for ignored ----------------------------------


def assign_atss(anchors, counts, boxes):
    return published(anchors, counts, boxes, 9)[0]


def assign_max_iou(anchors, counts, boxes):
    if len(boxes) == 0:
        return torch.full((len(anchors),), -1)
    overlaps = box_iou(anchors, boxes)
    best, box = overlaps.max(1)
    assigned = torch.where(best < 0.4, -1, torch.where(best < 0.5, -2, box))
    highest = overlaps.max(0).values
    forced = ((overlaps == highest) & (highest > 0)).any(1)
    return torch.where(forced, box, assigned)


def assign_fcos(anchors, counts, boxes):
    ranges = [(0, 64), (64, 128), (128, 256), (256, 512), (512, float("inf"))]
    assigned, first = [], 0
    for count, (low, high) in zip(counts, ranges, strict=True):
        for x1, y1, x2, y2 in anchors[first : first + count].tolist():
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            fitting = []
            for index, (left, top, right, bottom) in enumerate(boxes.tolist()):
                sides = x - left, y - top, right - x, bottom - y
                if min(sides) > 0 and low <= max(sides) <= high:
                    fitting.append(((right - left) * (bottom - top), index))
            assigned.append(min(fitting)[1] if fitting else -1)
        first += count
    return torch.tensor(assigned)


ASSIGNERS = {"atss": assign_atss, "max_iou": assign_max_iou, "fcos": assign_fcos}


# ---- losses -------------------------------------------------------------------------------------


def focal(logits, label):
    """Summed over the classes of one anchor."""
    p = logits.double().sigmoid()
    target = torch.zeros_like(p)
    if label >= 0:
        target[label] = 1
    positive = -0.25 * (1 - p) ** 2 * p.log()
    negative = -0.75 * p**2 * (1 - p).log()
    return (target * positive + (1 - target) * negative).sum()


def giou_loss(a, b):
    """Of two boxes [4]."""
    overlap = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
    hull = (torch.maximum(a[2:], b[2:]) - torch.minimum(a[:2], b[:2])).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - overlap
    return 1 - overlap / union + (hull - union) / hull


def centerness_of(anchor, box):
    x, y = ((anchor[:2] + anchor[2:]) / 2).tolist()
    left, top, right, bottom = x - box[0], y - box[1], box[2] - x, box[3] - y
    if min(left, top, right, bottom) <= 0:
        return torch.tensor(0.0, dtype=torch.float64)
    horizontal = min(left, right) / max(left, right)
    return (horizontal * min(top, bottom) / max(top, bottom)).double().sqrt()


def plain_losses(outputs, targets, sizes, assigner):
    class_maps, delta_maps, centerness_maps = outputs
    anchors, counts = plain_anchors(class_maps)
    class_sum = box_sum = centerness_sum = weight_sum = torch.zeros((), dtype=torch.float64)
    positives = 0
    for image, (target, (height, width)) in enumerate(zip(targets, sizes, strict=True)):
        x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2).unbind(1)
        inside = (x < width) & (y < height)
        levels = [int(part.sum()) for part in inside.split(counts)]
        own = anchors[inside]
        logits, deltas, centerness = (
            of_image(maps, image)[inside].double()
            for maps in (class_maps, delta_maps, centerness_maps)
        )
        predicted = decoded(own.double(), deltas)
        assigned = ASSIGNERS[assigner](own, levels, target["boxes"])
        for anchor, box_index in enumerate(assigned.tolist()):
            if box_index == -2:
                continue
            label = int(target["labels"][box_index]) if box_index >= 0 else -1
            class_sum = class_sum + focal(logits[anchor], label)
            if box_index < 0:
                continue
            positives += 1
            box = target["boxes"][box_index].double()
            weight = centerness_of(own[anchor].double(), box)
            p = centerness[anchor, 0].sigmoid()
            centerness_sum = centerness_sum - weight * p.log() - (1 - weight) * (1 - p).log()
            box_sum = box_sum + weight * giou_loss(predicted[anchor], box)
            weight_sum = weight_sum + weight
    return {
        "loss_class": class_sum / max(1, positives),
        "loss_box": 2 * box_sum / max(1, weight_sum),
        "loss_centerness": centerness_sum / max(1, positives),
    }


# ---- detections ---------------------------------------------------------------------------------


def plain_detections(outputs, sizes, threshold, per_level, nms_iou, most):
    class_maps, delta_maps, centerness_maps = outputs
    anchors, counts = plain_anchors(class_maps)
    results = []
    for image, (height, width) in enumerate(sizes):
        probabilities = of_image(class_maps, image).sigmoid()
        scores = probabilities * of_image(centerness_maps, image).sigmoid()
        boxes = decoded(anchors, of_image(delta_maps, image))
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        found, first = [], 0
        for count in counts:
            level = [
                (float(scores[anchor, label]), label, anchor)
                for anchor in range(first, first + count)
                for label in range(scores.shape[1])
                if probabilities[anchor, label] > threshold
            ]
            found += sorted(level, reverse=True)[:per_level]
            first += count
        kept = []
        for label in range(scores.shape[1]):
            own = [
                (score, anchor)
                for score, its, anchor in found
                if its == label and (boxes[anchor, 2:] > boxes[anchor, :2]).all()
            ]
            if own:
                score, anchor = torch.tensor([s for s, _ in own]), [a for _, a in own]
                for index in nms(boxes[anchor], score, nms_iou).tolist():
                    kept.append((own[index][0], label, boxes[own[index][1]].tolist()))
        results.append(sorted(kept, reverse=True)[:most])
    return results
