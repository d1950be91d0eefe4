"""COCO's metric, and pictures of detections."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from torch import Tensor

from detection.coco import CocoData
from dlkernels.models.detection.detector import Detector
from dlkernels.models.detection.pictures import draw, read_image


@torch.no_grad()
def detections_of(
    detector: Detector, data: CocoData, batch_size: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """The detections in each image of a data set, by a detector in evaluation mode."""
    found = []
    for first in range(0, len(data.entries), batch_size):
        entries = data.entries[first : first + batch_size]
        images = [read_image(entry.path).to(device).float() / 255 for entry in entries]
        found += [{key: v.cpu() for key, v in image.items()} for image in detector(images)]
    return found


def coco_map(data: CocoData, detections: list[dict[str, Tensor]]) -> dict[str, float]:
    """Average precision: ``mAP`` over IoU 0.50 to 0.95, and ``mAP50``; 0 with no detections."""
    rows = []
    for entry, found in zip(data.entries, detections, strict=True):
        boxes = found["boxes"].double()
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), 1).tolist()
        labels, scores = found["labels"].tolist(), found["scores"].tolist()
        for box, score, label in zip(boxes, scores, labels, strict=True):
            category = data.category_ids[label]
            row = {"image_id": entry.id, "category_id": category, "bbox": box, "score": score}
            rows.append(row)
    if not rows:
        return {"mAP": 0.0, "mAP50": 0.0}
    content = json.loads(data.file.read_text())
    for annotation in content["annotations"]:
        _, _, width, height = annotation["bbox"]
        annotation.setdefault("area", width * height)
        annotation.setdefault("iscrowd", 0)
    truth = COCO(content)
    evaluation = COCOeval_faster(truth, truth.loadRes(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {"mAP": float(evaluation.stats[0]), "mAP50": float(evaluation.stats[1])}


def save_picture(
    path: Path,
    data: CocoData,
    detections: list[dict[str, Tensor]],
    columns: int = 4,
    rows: int = 2,
    threshold: float = 0.3,
) -> None:
    """Writes a picture of the first images with their detections."""
    pictures = []
    for entry, found in zip(data.entries[: columns * rows], detections, strict=False):
        kept = found["scores"] >= threshold
        shown = {key: value[kept] for key, value in found.items()}
        image = read_image(entry.path)
        pictures.append(draw(image, shown, data.classes, max(1, 256 // max(image.shape))))
    width, height = (max(p.size[axis] for p in pictures) for axis in (0, 1))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(pictures)), height * rows))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    sheet.save(path)
