"""Samples for training: images and targets, flipped and put together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from detection.coco import CocoData
from dlkernels.models.detection.pictures import read_image

LEAST_VISIBLE = 0.4  # of a box that a crop cuts, to be kept

Target = dict[str, Tensor]
Sample = tuple[Tensor, Target]


def seeded(*numbers: int) -> torch.Generator:
    """A generator of its own for these numbers, whatever was drawn before."""
    state = 0
    for number in numbers:
        state = (state * 1_000_003 + number + 1) % (2**61 - 1)
    return torch.Generator().manual_seed(state)


def flipped(image: Tensor, target: Target) -> Sample:
    """The mirror image of [3, H, W], and its boxes."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[2] - target["boxes"][:, [2, 0]]
    return image.flip(2), {**target, "boxes": boxes}


def cropped(image: Tensor, target: Target, top: int, left: int, height: int, width: int) -> Sample:
    """A part of an image, and the boxes of which enough is visible there."""
    boxes = target["boxes"] - target["boxes"].new_tensor([left, top, left, top])
    visible = boxes.clone()
    visible[:, 0::2] = boxes[:, 0::2].clamp(0, width)
    visible[:, 1::2] = boxes[:, 1::2].clamp(0, height)
    area, whole = ((b[:, 2:] - b[:, :2]).prod(1) for b in (visible, boxes))
    kept = area >= LEAST_VISIBLE * whole
    part = image[:, top : top + height, left : left + width]
    return part, {"boxes": visible[kept], "labels": target["labels"][kept]}


def mosaic(samples: list[Sample], generator: torch.Generator) -> Sample:
    """Parts of four images around a random point, in the size of the first.

    Bochkovskiy, Wang and Liao, "YOLOv4" (2020), section 3.3. A part that its image does not fill is
    grey.
    """
    height, width = samples[0][0].shape[1:]

    def drawn(low: float, high: float) -> int:
        return int(low + (high - low) * torch.rand((), generator=generator).item())

    y, x = drawn(0.25 * height, 0.75 * height), drawn(0.25 * width, 0.75 * width)
    canvas = torch.full_like(samples[0][0], 114)
    boxes, labels = [], []
    corners = ((0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width))
    for (image, target), (top, left, bottom, right) in zip(samples, corners, strict=True):
        part_height = min(bottom - top, image.shape[1])
        part_width = min(right - left, image.shape[2])
        first_row = drawn(0, image.shape[1] - part_height + 1)
        first_column = drawn(0, image.shape[2] - part_width + 1)
        part, inside = cropped(image, target, first_row, first_column, part_height, part_width)
        canvas[:, top : top + part_height, left : left + part_width] = part
        boxes.append(inside["boxes"] + torch.tensor([left, top, left, top]))
        labels.append(inside["labels"])
    return canvas, {"boxes": torch.cat(boxes), "labels": torch.cat(labels)}


class TrainingSamples(Dataset[Sample]):
    """Augmented samples of a data set, float images from 0 to 1.

    A sample depends on its key, (epoch, index), and the seed alone: not on what was drawn before,
    nor on the process that draws it. So training goes on after a kill as if there had been none.

    Args:
        data: the data set.
        mosaic_probability: of a sample to be made of four images.
        flip_probability: of a sample to be mirrored.
        seed: of all that is random.
        cache: keeps decoded images in memory.
    """

    def __init__(
        self,
        data: CocoData,
        mosaic_probability: float,
        flip_probability: float,
        seed: int,
        cache: bool = False,
    ):
        self.data = data
        self.mosaic_probability = mosaic_probability
        self.flip_probability = flip_probability
        self.seed = seed
        self._cache: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.data.entries)

    def original(self, index: int) -> Sample:
        """An image uint8 [3, H, W] as it is in the data set, and its target.

        Raises:
            ValueError: the image's size is not what the annotation file says.
        """
        entry = self.data.entries[index]
        image = self._cache.get(index) if self._cache is not None else None
        if image is None:
            image = read_image(entry.path)
            if tuple(image.shape[1:]) != entry.size:
                raise ValueError(
                    f"{self.data.file}: image {entry.id}, {entry.path.name}, must have the size "
                    f"{entry.size}, but has {tuple(image.shape[1:])}"
                )
            if self._cache is not None:
                self._cache[index] = image
        return image, entry.target()

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        generator = seeded(self.seed, epoch, index)
        chance, mirror = torch.rand(2, generator=generator).tolist()
        sample = self.original(index)
        if chance < self.mosaic_probability:
            others = torch.randint(len(self), (3,), generator=generator).tolist()
            sample = mosaic([sample, *map(self.original, others)], generator)
        if mirror < self.flip_probability:
            sample = flipped(*sample)
        image, target = sample
        return image.float() / 255, target


class Batches(Sampler[list[tuple[int, int]]]):
    """The keys of the batches from a step on: every epoch in an order of its own.

    Of several processes each gets its part of every batch. The last images of an epoch that fill
    no batch are left out.

    Args:
        images: how many there are.
        batch_size: over all processes.
        seed: of the order.
        steps: at which step training ends.
        first_step: at which it begins.
        rank: of this process.
        processes: how many there are.

    Raises:
        ValueError: there are fewer images than a batch needs, or processes cannot share a batch
            evenly.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        steps: int,
        first_step: int = 0,
        rank: int = 0,
        processes: int = 1,
    ):
        if images < batch_size:
            raise ValueError(f"batch size must be at most the {images} images, but is {batch_size}")
        if batch_size % processes:
            raise ValueError(
                f"batch size must be a multiple of the {processes} processes, but is {batch_size}"
            )
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.steps, self.first_step = steps, first_step
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.images // self.batch_size
        for step in range(self.first_step, self.steps):
            epoch, place = divmod(step, per_epoch)
            if step == self.first_step or place == 0:
                order = torch.randperm(self.images, generator=seeded(self.seed, epoch)).tolist()
            batch = order[place * self.batch_size : (place + 1) * self.batch_size]
            yield [(epoch, index) for index in batch[self.rank :: self.processes]]
