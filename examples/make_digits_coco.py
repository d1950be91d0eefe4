"""Makes a small data set of real input that needs no download, in COCO's format.

scikit-learn's handwritten digits are scaled and drawn in light colours on dimmed crops of its two
photographs: 1 to 12 on each image, some tiny, some overlapping. The held-out split has digits and
parts of the photographs that the training split has not. The same seed makes the same files.

    python examples/make_digits_coco.py out/digits
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

HELD_OUT = 0.2  # of the digits, and of each photograph's width at its right
SIDES = 0.14, 0.4  # least and most of a digit over that of the image; the logarithm is uniform
DIMMING = 0.5  # of the photographs
INK = 0.3  # a digit's box holds what is at least this opaque
MOST_OVERLAP = 0.3  # of the smaller of two boxes
TRIES = 20  # places tried for a digit before it is left out


@dataclass(frozen=True)
class Source:
    """What the images of a split are made of.

    Attributes:
        glyphs: opacity of each digit, 0 to 1, [D, 8, 8].
        labels: of the digits.
        photographs: uint8 [H, W, 3] each.
    """

    glyphs: np.ndarray
    labels: np.ndarray
    photographs: list[np.ndarray]


def sources(seed: int) -> tuple[Source, Source]:
    """The sources of the training split and of the held-out split, which share nothing."""
    digits = load_digits()
    glyphs = (digits.images / 16).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(glyphs))
    last = int(len(order) * (1 - HELD_OUT))
    photographs = load_sample_images().images
    cut = int(photographs[0].shape[1] * (1 - HELD_OUT))
    parts = (order[:last], slice(None, cut)), (order[last:], slice(cut, None))
    train, val = (
        Source(glyphs[part], digits.target[part], [p[:, columns] for p in photographs])
        for part, columns in parts
    )
    return train, val


def compose(
    source: Source, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[list[int]], list[int]]:
    """One image uint8 [size, size, 3], and the boxes (x, y, width, height) and labels on it."""
    image = _background(source.photographs, size, rng)
    boxes: list[list[int]] = []
    labels: list[int] = []
    for _ in range(rng.integers(1, 13)):
        index = rng.integers(len(source.glyphs))
        side = round(float(np.exp(rng.uniform(*np.log(SIDES)))) * size)
        opacity = _scaled(source.glyphs[index], side)
        for _ in range(TRIES):
            left, top = (int(v) for v in rng.integers(0, size - side + 1, 2))
            box = _ink_box(opacity, left, top)
            if all(_overlap(box, other) <= MOST_OVERLAP for other in boxes):
                _draw(image, opacity, left, top, rng)
                boxes.append(box)
                labels.append(int(source.labels[index]))
                break
    return image.round().astype(np.uint8), boxes, labels


def _background(photographs: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    photograph = photographs[rng.integers(len(photographs))]
    height, width = photograph.shape[:2]
    side = int(rng.integers(min(64, size), min(height, width) + 1))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    crop = Image.fromarray(photograph[top : top + side, left : left + side])
    return DIMMING * np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR), np.float32)


def _scaled(glyph: np.ndarray, side: int) -> np.ndarray:
    scaled = Image.fromarray(glyph).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(scaled).clip(0, 1)


def _ink_box(opacity: np.ndarray, left: int, top: int) -> list[int]:
    rows, columns = (np.flatnonzero((opacity >= INK).any(axis)) for axis in (1, 0))
    x, y = columns[0], rows[0]
    return [int(v) for v in (left + x, top + y, columns[-1] - x + 1, rows[-1] - y + 1)]


def _overlap(a: list[int], b: list[int]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height) / min(a[2] * a[3], b[2] * b[3])


def _draw(
    image: np.ndarray, opacity: np.ndarray, left: int, top: int, rng: np.random.Generator
) -> None:
    """Draws a digit in a light colour."""
    side = len(opacity)
    place = image[top : top + side, left : left + side]
    place += opacity[..., None] * (rng.uniform(190, 255, 3) - place)


def write_split(folder: Path, name: str, source: Source, count: int, size: int, seed: int) -> None:
    """Writes ``folder/name/*.png`` and ``folder/name.json``."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        image, boxes, labels = compose(source, size, rng)
        file_name = f"{index:05d}.png"
        Image.fromarray(image).save(folder / name / file_name)
        images.append({"id": index, "file_name": file_name, "width": size, "height": size})
        for box, label in zip(boxes, labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": digit, "name": str(digit)} for digit in range(10)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(content))


def make(folder: Path, train: int, val: int, size: int, seed: int) -> None:
    """Writes the splits ``train`` and ``val``, so many images of ``size`` pixels a side."""
    for index, (name, count) in enumerate({"train": train, "val": val}.items()):
        write_split(folder, name, sources(seed)[index], count, size, 2 * seed + index)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and makes the data set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=2400, help="images to train on")
    parser.add_argument("--val", type=int, default=300, help="held-out images")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    make(options.folder, options.train, options.val, options.size, options.seed)
    print(f"{options.train} and {options.val} images in {options.folder}")


if __name__ == "__main__":
    main()
