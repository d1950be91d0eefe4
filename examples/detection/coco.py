"""Data sets in COCO's format, checked as a whole before they are used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_OUTSIDE = 1.0  # pixels: published annotations are rounded


@dataclass
class Entry:
    """An image and its objects.

    Attributes:
        id: of the image in the annotation file.
        path: of the image.
        size: (height, width) in pixels.
        boxes: x1 y1 x2 y2 in pixels, inside the image.
        labels: from 0, in the order of the category ids.
    """

    id: int
    path: Path
    size: tuple[int, int]
    boxes: list[list[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def target(self) -> dict[str, Tensor]:
        """Boxes float32 [G, 4] and labels int64 [G], as detectors take them."""
        boxes = torch.tensor(self.boxes, dtype=torch.float32).view(-1, 4)
        return {"boxes": boxes, "labels": torch.tensor(self.labels, dtype=torch.int64)}


@dataclass(frozen=True)
class CocoData:
    """A data set.

    Attributes:
        file: the annotation file.
        classes: names of the categories, in the order of their ids.
        category_ids: id of each class.
        entries: the images, in the order of their ids.
    """

    file: Path
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    entries: list[Entry]


def read_coco(images: Path, file: Path) -> CocoData:
    """Reads an annotation file; crowds are left out.

    Args:
        images: the folder of the images.
        file: JSON with ``images``, ``annotations`` and ``categories``.

    Raises:
        ValueError: the file is no such JSON, an image file is missing, or an annotation has an
            unknown image or category, or a box that is not finite, has no extent or lies outside
            its image; the message names the file and the item.
    """
    content = _parsed(file)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    entries = _entries(images, file, content["images"])
    for annotation in content["annotations"]:
        _add(annotation, entries, label_of, file)
    return CocoData(
        file,
        tuple(str(category["name"]) for category in categories),
        tuple(label_of),
        [entries[key] for key in sorted(entries)],
    )


def _parsed(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    needed = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for part, keys in needed.items():
        items = content.get(part) if isinstance(content, dict) else None
        if not isinstance(items, list):
            raise ValueError(f"{file} must have a list of {part}")
        for index, item in enumerate(items):
            missing = [key for key in keys if not isinstance(item, dict) or key not in item]
            if missing:
                raise ValueError(f"{file}: {part}[{index}] lacks {', '.join(missing)}")
        ids = [item["id"] for item in items]
        if len(set(ids)) < len(ids):
            twice = next(key for key in ids if ids.count(key) > 1)
            raise ValueError(f"{file}: {part} has the id {twice} twice")
    if not content["images"] or not content["categories"]:
        raise ValueError(f"{file} must have at least one image and one category")
    return content


def _entries(folder: Path, file: Path, images: list[dict[str, Any]]) -> dict[int, Entry]:
    missing = [image for image in images if not (folder / image["file_name"]).is_file()]
    if missing:
        first = missing[0]
        raise ValueError(
            f"{file}: {len(missing)} of {len(images)} images are not in {folder}, the first is "
            f"image {first['id']}, {first['file_name']}"
        )
    return {
        image["id"]: Entry(
            image["id"], folder / image["file_name"], (image["height"], image["width"])
        )
        for image in images
    }


def _add(
    annotation: Mapping[str, Any],
    entries: Mapping[int, Entry],
    label_of: Mapping[int, int],
    file: Path,
) -> None:
    """Checks an annotation and adds it to its image's entry."""
    where = f"{file}: annotation {annotation['id']}"
    entry = entries.get(annotation["image_id"])
    if entry is None:
        raise ValueError(f"{where} is of image {annotation['image_id']}, which is not there")
    if annotation["category_id"] not in label_of:
        raise ValueError(f"{where} has the unknown category {annotation['category_id']}")
    box = annotation["bbox"]
    numbers = isinstance(box, list) and all(isinstance(v, int | float) for v in box)
    if not numbers or len(box) != 4 or not all(math.isfinite(v) for v in box):
        raise ValueError(f"{where}: bbox must be four finite numbers, but is {box}")
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise ValueError(f"{where}: bbox must have width and height above 0, but is {box}")
    image_height, image_width = entry.size
    outside = max(-x, -y, x + width - image_width, y + height - image_height)
    if outside > MOST_OUTSIDE:
        raise ValueError(
            f"{where}: bbox must lie inside its image of {image_width} x {image_height} pixels, "
            f"{entry.path.name}, but is {box}"
        )
    if annotation.get("iscrowd"):
        return
    entry.boxes.append(
        [max(0, x), max(0, y), min(x + width, image_width), min(y + height, image_height)]
    )
    entry.labels.append(label_of[annotation["category_id"]])
