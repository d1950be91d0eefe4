"""YOLO in plain PyTorch: networks of plain modules, losses and assignment in loops.

The networks give their parameters in the order in which the library's have theirs.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from dlkernels.nn import ASFF

STRIDES = (8, 16, 32)


# ---- networks -----------------------------------------------------------------------------------


def block(channels, out, kernel=1, stride=1, mish=False):
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out),
        nn.Mish() if mish else nn.LeakyReLU(0.1, inplace=True),
    )


class PlainResidual(nn.Module):
    def __init__(self, channels, hidden, mish):
        super().__init__()
        self.convs = nn.Sequential(
            block(channels, hidden, mish=mish), block(hidden, channels, 3, mish=mish)
        )

    def forward(self, x):
        return x + self.convs(x)


class PlainCSP(nn.Module):
    def __init__(self, channels, out, blocks, first):
        super().__init__()
        part = out if first else out // 2
        self.down = block(channels, out, 3, 2, mish=True)
        self.left = block(out, part, mish=True)
        self.right = block(out, part, mish=True)
        self.blocks = nn.Sequential(
            *(PlainResidual(part, out // 2 if first else part, True) for _ in range(blocks))
        )
        self.after = block(part, part, mish=True)
        self.out = block(2 * part, out, mish=True)

    def forward(self, x):
        x = self.down(x)
        left = self.left(x)
        return self.out(torch.cat([self.after(self.blocks(self.right(x))), left], 1))


def convs(channels, hidden, count):
    layers = []
    for index in range(count):
        out = 2 * hidden if index % 2 else hidden
        layers.append(block(channels, out, 3 if index % 2 else 1))
        channels = out
    return nn.Sequential(*layers)


class PlainYOLOv4(nn.Module):
    """``widths`` of the six stages, ``blocks`` of the last five, ``out`` channels of the heads."""

    def __init__(self, widths, blocks, out):
        super().__init__()
        self.stem = block(3, widths[0], 3, mish=True)
        self.stages = nn.ModuleList(
            PlainCSP(widths[i], widths[i + 1], count, i == 0) for i, count in enumerate(blocks)
        )
        f, m, c = (width // 2 for width in widths[-3:])
        self.neck = nn.ModuleList(
            [
                convs(2 * c, c, 3),
                convs(4 * c, c, 3),
                block(c, m),
                block(2 * m, m),
                convs(2 * m, m, 5),
                block(m, f),
                block(2 * f, f),
                convs(2 * f, f, 5),
                nn.Sequential(block(f, 2 * f, 3), nn.Conv2d(2 * f, out, 1)),
                block(f, m, 3, 2),
                convs(2 * m, m, 5),
                nn.Sequential(block(m, 2 * m, 3), nn.Conv2d(2 * m, out, 1)),
                block(m, c, 3, 2),
                convs(2 * c, c, 5),
                nn.Sequential(block(c, 2 * c, 3), nn.Conv2d(2 * c, out, 1)),
            ]
        )

    def forward(self, x):
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        fine, middle, coarse = maps[-3:]
        n = self.neck
        x = n[0](coarse)
        p5 = n[1](torch.cat([*(F.max_pool2d(x, k, 1, k // 2) for k in (13, 9, 5)), x], 1))
        p4 = n[4](torch.cat([n[3](middle), F.interpolate(n[2](p5), scale_factor=2)], 1))
        p3 = n[7](torch.cat([n[6](fine), F.interpolate(n[5](p4), scale_factor=2)], 1))
        p4 = n[10](torch.cat([n[9](p3), p4], 1))
        p5 = n[13](torch.cat([n[12](p4), p5], 1))
        return [n[8](p3), n[11](p4), n[14](p5)]


class PlainYOLOv3ASFF(nn.Module):
    def __init__(self, widths, blocks, out):
        super().__init__()
        self.stem = block(3, widths[0], 3)
        self.stages = nn.ModuleList(
            nn.Sequential(
                block(a, b, 3, 2), *(PlainResidual(b, b // 2, False) for _ in range(count))
            )
            for a, b, count in zip(widths, widths[1:], blocks, strict=False)
        )
        f, m, c = (width // 2 for width in widths[-3:])
        self.neck = nn.ModuleList(
            [
                convs(2 * c, c, 5),
                block(c, m),
                convs(3 * m, m, 5),
                block(m, f),
                convs(3 * f, f, 4),
            ]
        )
        fusion = {"channels": (c, m, 2 * f)}
        self.fusions = nn.ModuleList(
            ASFF(level, **fusion, out_channels=widths[-1 - level]) for level in (2, 1, 0)
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, out, 1) for width in widths[-3:])

    def forward(self, x):
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        n = self.neck
        p5 = n[0](maps[-1])
        p4 = n[2](torch.cat([F.interpolate(n[1](p5), scale_factor=2), maps[-2]], 1))
        p3 = n[4](torch.cat([F.interpolate(n[3](p4), scale_factor=2), maps[-3]], 1))
        pairs = zip(self.fusions, self.heads, strict=True)
        return [head(fuse(p5, p4, p3)) for fuse, head in pairs]


# ---- losses -------------------------------------------------------------------------------------


def overlap(a, b):
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    both = max(wide, 0) * max(high, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def shape_overlap(a, b):
    both = min(a[0], b[0]) * min(a[1], b[1])
    return both / (a[0] * a[1] + b[0] * b[1] - both)


def ciou_loss(box, target):
    low, high = torch.maximum(box[:2], target[:2]), torch.minimum(box[2:], target[2:])
    both = (high - low).clamp(min=0).prod()
    size, wanted = box[2:] - box[:2], target[2:] - target[:2]
    iou = both / (size.prod() + wanted.prod() - both)
    hull = torch.maximum(box[2:], target[2:]) - torch.minimum(box[:2], target[:2])
    distance = (box[:2] + box[2:] - target[:2] - target[2:]) / 2
    angles = torch.atan(wanted[0] / wanted[1]) - torch.atan(size[0] / size[1])
    v = 4 / math.pi**2 * angles**2
    alpha = (v / (1 - iou + v)).detach()
    return 1 - iou + distance.square().sum() / hull.square().sum() + alpha * v


def plain_losses(model, outputs, targets, sizes):
    """The three losses, box by box and anchor by anchor, and the number of positives."""
    values = 5 + model.num_classes
    box_sum = class_sum = confidence_sum = torch.zeros((), dtype=torch.float64)
    positives = 0
    priors = [prior for level in model.anchors for prior in level]
    per_cell = len(model.anchors[0])
    for image, (target, (height, width)) in enumerate(zip(targets, sizes, strict=True)):
        boxes = target["boxes"].tolist()
        claims = {}  # (level, row, column, anchor): (IoU of shapes, box)
        for index, (x1, y1, x2, y2) in enumerate(boxes):
            shapes = [shape_overlap((x2 - x1, y2 - y1), prior) for prior in priors]
            best = shapes.index(max(shapes))
            for number, shape in enumerate(shapes):
                if number != best and shape <= model.shape_iou:
                    continue
                level, anchor = divmod(number, per_cell)
                stride = STRIDES[level]
                column, row = ((x1 + x2) / 2 // stride, (y1 + y2) / 2 // stride)
                key = (level, int(row), int(column), anchor)
                if key not in claims or shape > claims[key][0]:
                    claims[key] = (shape, index)
        for level, maps in enumerate(outputs):
            stride = STRIDES[level]
            for row in range(maps.shape[2]):
                for column in range(maps.shape[3]):
                    if column * stride >= width or row * stride >= height:
                        continue
                    for anchor, (w, h) in enumerate(model.anchors[level]):
                        channels = slice(anchor * values, (anchor + 1) * values)
                        own = maps[image, channels, row, column].double()
                        x, y = (column + 0.5) * stride, (row + 0.5) * stride
                        place = x - w / 2, y - h / 2, x + w / 2, y + h / 2
                        _, index = claims.get((level, row, column, anchor), (0, -1))
                        p = own[4].sigmoid()
                        if index < 0:
                            ignored = any(overlap(place, b) > model.ignore_iou for b in boxes)
                            confidence_sum = confidence_sum - (0 if ignored else (1 - p).log())
                            continue
                        positives += 1
                        confidence_sum = confidence_sum - p.log()
                        wanted = F.one_hot(target["labels"][index], model.num_classes)
                        q = own[5:].sigmoid()
                        class_sum = class_sum - torch.where(wanted == 1, q, 1 - q).log().sum()
                        scale = model.scale_xy[level]
                        shift = own[:2].sigmoid() * scale - (scale - 1) / 2
                        centre = (shift + torch.tensor([column, row])) * stride
                        size = own[2:4].exp() * torch.tensor([w, h])
                        box = torch.cat([centre - size / 2, centre + size / 2])
                        box_sum = box_sum + ciou_loss(box, target["boxes"][index].double())
    weights = model.loss_weights
    return {
        "loss_box": weights.box * box_sum / max(1, positives),
        "loss_confidence": weights.confidence * confidence_sum / max(1, positives),
        "loss_class": weights.class_ * class_sum / max(1, positives),
    }, positives
