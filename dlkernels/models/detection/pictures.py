"""Images from files, detections as JSON and as pictures."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from dlkernels.models.detection.checkpoint import config_of, load_detector, read


def read_image(path: Path) -> Tensor:
    """An image file as uint8 [3, H, W].

    Raises:
        ValueError: the file is no image, or a damaged one.
    """
    try:
        with Image.open(path) as image:
            return pil_to_tensor(image.convert("RGB"))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no image, or a damaged one: {error}") from error


def draw(
    image: Tensor, detections: Mapping[str, Tensor], classes: Sequence[str], enlarge: int = 1
) -> Image.Image:
    """The boxes of detections on their image uint8 [3, H, W], with class and score."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.resize((enlarge * picture.width, enlarge * picture.height))
    pen = ImageDraw.Draw(picture)
    for box, score, label in _listed(detections):
        rgb = colorsys.hsv_to_rgb(label / len(classes), 1, 1)
        colour = tuple(round(255 * value) for value in rgb)
        corners = [enlarge * side for side in box]
        pen.rectangle(corners, outline=colour)
        text, place = f"{classes[label]} {score:.2f}", (corners[0] + 1, max(0, corners[1] - 11))
        pen.rectangle(pen.textbbox(place, text), fill="black")
        pen.text(place, text, fill=colour)
    return picture


def as_json(path: Path, detections: Mapping[str, Tensor], classes: Sequence[str]) -> dict[str, Any]:
    """The detections of an image: boxes x1 y1 x2 y2 in pixels, from best to worst."""
    found = [
        {"box": [round(side, 2) for side in box], "score": round(score, 4), "class": classes[label]}
        for box, score, label in _listed(detections)
    ]
    return {"image": str(path), "detections": found}


def _listed(detections: Mapping[str, Tensor]) -> list[tuple[list[float], float, int]]:
    return list(
        zip(*(detections[key].tolist() for key in ("boxes", "scores", "labels")), strict=True)
    )


def detect_files(
    paths: Sequence[Path], model: str | None, weights: Path, output: Path, threshold: float
) -> str:
    """Detects in image files, writes a PNG of each into ``output``, and returns JSON.

    Args:
        paths: of the images, whose names must differ.
        model: the detector's name, which the checkpoint must have; None for any.
        weights: a checkpoint of ``examples/train_detector.py``.
        output: a folder.
        threshold: the least score of a detection.

    Raises:
        ValueError: the checkpoint or an image cannot be used; the message names the file.
    """
    name = config_of(read(weights)).model
    if model not in (None, name):
        raise ValueError(f"{weights} must hold the detector {model!r}, but holds {name!r}")
    detector, classes = load_detector(weights)
    stems = [path.stem for path in paths]
    if len(set(stems)) < len(stems):
        raise ValueError(f"images must have different names, but are {sorted(stems)}")
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for path in paths:
        image = read_image(path)
        with torch.no_grad():
            (detections,) = detector([image.float() / 255])
        kept = detections["scores"] >= threshold
        detections = {key: value[kept] for key, value in detections.items()}
        draw(image, detections, classes).save(output / f"{path.stem}.png")
        results.append(as_json(path, detections, classes))
    return json.dumps(results, indent=2)
