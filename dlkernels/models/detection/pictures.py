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
from dlkernels.models.detection.darknet import Darknet, load_weights
from dlkernels.models.detection.detector import Detector


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


def loaded(
    model: str | None, weights: Path, cfg: Path | None = None, names: Path | None = None
) -> tuple[Detector, Sequence[str]]:
    """A detector from files, in evaluation mode, and the names of its classes.

    Args:
        model: the detector's name, which the checkpoint must have; None for any.
        weights: a checkpoint of ``examples/train_detector.py``; with ``cfg`` Darknet's weights.
        cfg: a network of Darknet's, or None.
        names: a file with the name of a class on each line, for ``cfg``; by default classes are
            numbered.

    Raises:
        ValueError: a file cannot be used, or the files do not belong together; the message names
            the file.
    """
    if cfg is None:
        if names is not None:
            raise ValueError(f"{names} is of use with a cfg only: checkpoints hold their names")
        name = config_of(read(weights)).model
        if model not in (None, name):
            raise ValueError(f"{weights} must hold the detector {model!r}, but holds {name!r}")
        return load_detector(weights)
    if model is not None:
        raise ValueError(
            f"the detector is that of {cfg}: no model is to be named, but {model!r} is"
        )
    try:
        detector = Darknet(cfg.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{cfg}: {error}") from error
    load_weights(detector, weights)
    classes = [str(label) for label in range(detector.num_classes)]
    if names is not None:
        classes = [line.strip() for line in names.read_text().splitlines() if line.strip()]
        if len(classes) != detector.num_classes:
            raise ValueError(
                f"{names} must have the {detector.num_classes} classes of {cfg}, but has "
                f"{len(classes)}"
            )
    return detector.eval(), classes


def detect_files(
    paths: Sequence[Path],
    detector: Detector,
    classes: Sequence[str],
    output: Path,
    threshold: float,
) -> str:
    """Detects in image files, writes a PNG of each into ``output``, and returns JSON.

    Args:
        paths: of the images, whose names must differ.
        detector: in evaluation mode.
        classes: names of its classes.
        output: a folder.
        threshold: the least score of a detection.

    Raises:
        ValueError: an image cannot be used; the message names the file.
    """
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
