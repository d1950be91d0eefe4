"""Darknet's files: networks in ``.cfg``, weights in ``.weights``.

A ``.weights`` file begins with three int32, the version major, minor and revision, and the number
of images seen, an int64 from version 0.2 on and an int32 before. Then follow float32 in the order
of the cfg's convolutions: with batch norm its bias, weight, running mean and running variance, else
the convolution's bias; then the convolution's weight. All is little-endian.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlkernels.models.detection.conv_block import ConvBlock, Maps, concatenated, convolved
from dlkernels.models.detection.post_processing import PostProcessing
from dlkernels.models.detection.yolo_head import YOLO, LossWeights

_ACTIVATIONS = {"linear": "identity", "leaky": "leaky_relu", "mish": "mish", "relu": "relu"}
_VERSION = (0, 2, 5)

File = str | os.PathLike[str]


# ---- cfg ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A section of a cfg.

    Attributes:
        kind: what stands in brackets, such as ``"convolutional"``.
        line: where, from 1.
        options: names and values as written.
    """

    kind: str
    line: int
    options: dict[str, str]

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number.

        Raises:
            ValueError: it is missing and has no default, or it is no number.
        """
        return int(self._value(name, None if default is None else str(default), int))

    def real(self, name: str, default: float) -> float:
        """A real number."""
        return float(self._value(name, str(default), float))

    def numbers(self, name: str) -> list[int]:
        """Whole numbers with commas between them."""
        text = self._value(name, None, str)
        try:
            return [int(part) for part in text.split(",")]
        except ValueError:
            raise self.error(f"{name} must be whole numbers, but is {text!r}") from None

    def choice(self, name: str, default: str) -> str:
        """A word."""
        return self.options.get(name, default)

    def error(self, message: str) -> ValueError:
        """An error that names the section."""
        return ValueError(f"[{self.kind}] in line {self.line}: {message}")

    def _value(self, name: str, default: str | None, kind: type) -> str:
        value = self.options.get(name, default)
        if value is None:
            raise self.error(f"{name} is missing")
        try:
            kind(value)
        except ValueError:
            raise self.error(f"{name} must be a number, but is {value!r}") from None
        return value


def parse_cfg(text: str) -> list[Section]:
    """The sections of a cfg in order.

    Raises:
        ValueError: a line is neither a section, an option, a comment nor empty.
    """
    sections: list[Section] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#")[0].split(";")[0].strip()
        if not line:
            continue
        if line.startswith("[") and line.endswith("]"):
            sections.append(Section(line[1:-1].strip(), number, {}))
        elif "=" in line and sections:
            name, value = line.split("=", 1)
            sections[-1].options[name.strip()] = value.strip()
        else:
            raise ValueError(f"line {number} must be a [section] or name=value, but is {raw!r}")
    return sections


class Darknet(YOLO):
    """The detector that a cfg describes, such as yolov4, yolov4-tiny or yolov3.

    Knows the sections ``convolutional``, ``maxpool``, ``upsample``, ``route``, ``shortcut`` and
    ``yolo``. There may be three ``yolo`` at strides 8, 16 and 32, or two at 16
    and 32. See :class:`YOLO` for
    its outputs.

    Args:
        cfg: the text of the file.
        loss_weights: factors of the losses.
        post_processing: which predictions become detections.

    Raises:
        ValueError: a section or option is unknown or missing; the message names its line.
    """

    def __init__(
        self,
        cfg: str,
        *,
        loss_weights: LossWeights | None = None,
        post_processing: PostProcessing | None = None,
    ):
        net, *sections = parse_cfg(cfg) or [Section("", 1, {})]
        if net.kind not in ("net", "network"):
            raise net.error("the first section must be [net]")
        heads = sorted((s for s in sections if s.kind == "yolo"), key=_least_mask)
        if not heads:
            raise ValueError("the cfg must have a [yolo] section, but has none")
        for head in heads:
            if head.number("new_coords", 0):
                raise head.error("new_coords is not known")
        side = net.number("width", 416), net.number("height", 416)
        super().__init__(
            heads[0].number("classes"),
            anchors=[_anchors(head) for head in heads],
            scale_xy=[head.real("scale_x_y", 1.0) for head in heads],
            ignore_iou=heads[0].real("ignore_thresh", 0.5),
            shape_iou=heads[0].real("iou_thresh", 1.0),
            loss_weights=loss_weights,
            post_processing=post_processing,
            min_size=min(side),
            max_size=max(side),
            image_mean=(0.0, 0.0, 0.0),
            image_std=(1.0, 1.0, 1.0),
        )
        self.sections = sections
        self.layers = nn.ModuleList()
        channels = [net.number("channels", 3)]  # before each layer, and behind the last
        for index, section in enumerate(sections):
            layer, out = _layer(section, index, channels)
            self.layers.append(layer)
            channels.append(out)

    def raw_outputs(self, batch: Tensor) -> list[Tensor]:
        """Maps of the three levels for a batch [N, 3, H, W] that the transform has prepared."""
        x = Maps(batch)
        outputs: list[Maps] = []
        results: list[Tensor] = []
        last = self._last_uses()
        for index, (section, layer) in enumerate(zip(self.sections, self.layers, strict=True)):
            if section.kind == "route":
                x = _routed(section, [outputs[at] for at in _sources(section, index)])
            elif section.kind == "shortcut":
                x = Maps(x.value + outputs[_sources(section, index)[0]].value)
            elif section.kind == "yolo":
                results.append(x.value)
            elif isinstance(layer, ConvBlock):
                x = layer(x)
            elif isinstance(layer, nn.Conv2d):
                x = Maps(convolved(layer, x))
            else:
                x = Maps(layer(x.value))
            outputs.append(x)
            for at in last.get(index, ()):
                outputs[at] = Maps(batch)
        return sorted(results, key=lambda maps: -maps.shape[-1])

    def _last_uses(self) -> dict[int, list[int]]:
        """The layers whose outputs nothing reads after a layer."""
        last = {index: index + 1 for index in range(len(self.sections))}
        for index, section in enumerate(self.sections):
            if section.kind in ("route", "shortcut"):
                for at in _sources(section, index):
                    last[at] = max(last[at], index)
        uses: dict[int, list[int]] = {}
        for at, index in last.items():
            uses.setdefault(index, []).append(at)
        return uses


def _layer(section: Section, index: int, channels: list[int]) -> tuple[nn.Module, int]:
    """The module of a section, and the channels of its output."""
    before = channels[index]
    if section.kind == "convolutional":
        return _convolution(section, before), section.number("filters")
    if section.kind == "maxpool":
        size, stride = section.number("size"), section.number("stride", 1)
        return _MaxPool(size, stride), before
    if section.kind == "upsample":
        return nn.Upsample(scale_factor=section.number("stride", 2)), before
    if section.kind == "route":
        parts = [channels[at + 1] for at in _sources(section, index)]
        return nn.Identity(), sum(parts) // section.number("groups", 1)
    if section.kind == "shortcut":
        _sources(section, index)
        return nn.Identity(), before
    if section.kind == "yolo":
        expected = len(_anchors(section)) * (5 + section.number("classes"))
        if before != expected:
            raise section.error(
                f"the convolution before must have {expected} filters, but has {before}"
            )
        return nn.Identity(), before
    raise section.error("a section of this kind is not known")


def _convolution(section: Section, channels: int) -> nn.Module:
    name = section.choice("activation", "linear")
    if name not in _ACTIVATIONS:
        raise section.error(f"activation must be one of {', '.join(_ACTIVATIONS)}, but is {name!r}")
    if section.number("groups", 1) != 1 or section.number("pad", 0) != 1:
        raise section.error("only convolutions with pad=1 and without groups are known")
    filters, size, stride = (
        section.number("filters"),
        section.number("size"),
        section.number("stride", 1),
    )
    if section.number("batch_normalize", 0):
        return ConvBlock(channels, filters, size, stride, _ACTIVATIONS[name])
    if name != "linear":
        raise section.error("a convolution without batch_normalize must be linear")
    return nn.Conv2d(channels, filters, size, stride, size // 2)


class _MaxPool(nn.Module):
    """Darknet pads by ``size - 1``, half of it (rounded down) at the left and above."""

    def __init__(self, size: int, stride: int):
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, x: Tensor) -> Tensor:
        low = (self.size - 1) // 2
        high = self.size - 1 - low
        if low == high:
            return F.max_pool2d(x, self.size, self.stride, low)
        x = F.pad(x, (low, high, low, high), value=-torch.inf)
        return F.max_pool2d(x, self.size, self.stride)


def _sources(section: Section, index: int) -> list[int]:
    """The layers that a route or shortcut reads."""
    numbers = section.numbers("layers" if section.kind == "route" else "from")
    sources = [at if at >= 0 else index + at for at in numbers]
    for at in sources:
        if not 0 <= at < index:
            raise section.error(f"it is layer {index} and must read one before, but reads {at}")
    return sources


def _routed(section: Section, parts: list[Maps]) -> Maps:
    groups = section.number("groups", 1)
    if groups > 1:
        group = section.number("group_id", 0)
        parts = [Maps(part.value.chunk(groups, 1)[group]) for part in parts]
    return parts[0] if len(parts) == 1 else concatenated(*parts)


def _least_mask(section: Section) -> int:
    return min(section.numbers("mask"))


def _anchors(section: Section) -> list[tuple[float, float]]:
    """The anchors of a head, chosen by its mask."""
    values = section.numbers("anchors")
    pairs = list(zip(values[::2], values[1::2], strict=True))
    masks = section.numbers("mask")
    if max(masks) >= len(pairs):
        raise section.error(f"mask must choose among {len(pairs)} anchors, but is {masks}")
    return [pairs[mask] for mask in masks]


# ---- weights ------------------------------------------------------------------------------------


def load_weights(model: nn.Module, path: File) -> int:
    """Reads a ``.weights`` file into a model, whose convolutions stand in the order of the cfg.

    Nothing is changed where the file does not fit.

    Args:
        model: a :class:`Darknet`, or :class:`YOLOv4` for weights of ``yolov4.cfg``.
        path: of the file.

    Returns:
        The number of images that the weights were trained with.

    Raises:
        ValueError: the file is cut short or too long for the model; the message names the file,
            the layer and the numbers of bytes.
    """
    data = Path(path).read_bytes()
    if len(data) < 12:
        raise ValueError(f"{path} must begin with a header, but has only {len(data)} bytes")
    major, minor, _ = np.frombuffer(data, "<i4", 3).tolist()
    long = major * 10 + minor >= 2
    start = 20 if long else 16
    if len(data) < start:
        raise ValueError(
            f"{path} must begin with a header of {start} bytes, but has only {len(data)}"
        )
    seen = int(np.frombuffer(data, "<i8" if long else "<i4", 1, 12)[0])

    needed = start + 4 * sum(t.numel() for _, tensors in _convolutions(model) for t in tensors)
    values, at = [], start
    for name, tensors in _convolutions(model):
        for tensor in tensors:
            end = at + 4 * tensor.numel()
            if end > len(data):
                raise ValueError(
                    f"{path} must have {needed} bytes for this model, but has {len(data)}: it ends "
                    f"in layer {name}, which needs bytes up to {end}"
                )
            values.append((tensor, np.frombuffer(data, "<f4", tensor.numel(), at)))
            at = end
    if at != len(data):
        raise ValueError(
            f"{path} must have {needed} bytes for this model, but has {len(data)}: "
            f"{len(data) - needed} are left after the last layer, {name}"
        )
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(torch.from_numpy(value.copy()).view(tensor.shape))
    return seen


def save_weights(model: nn.Module, path: File, images_seen: int = 0) -> None:
    """Writes the model as :func:`load_weights` and Darknet read it.

    Args:
        model: as for :func:`load_weights`.
        path: of the file; it is written as a whole or not at all.
        images_seen: the number of images that the model was trained with.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(np.array(_VERSION, "<i4").tobytes() + np.array(images_seen, "<i8").tobytes())
        for _, tensors in _convolutions(model):
            for tensor in tensors:
                file.write(tensor.detach().float().cpu().numpy().astype("<f4").tobytes())
    unfinished.replace(path)


def _convolutions(model: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    """Each convolution's name and its tensors in Darknet's order."""
    blocks = {name for name, module in model.named_modules() if isinstance(module, ConvBlock)}
    for name, module in model.named_modules():
        if isinstance(module, ConvBlock):
            norm = module.norm
            tensors = [norm.bias, norm.weight, norm.running_mean, norm.running_var]
            yield name, [*cast(list[Tensor], tensors), module.conv.weight]
        elif isinstance(module, nn.Conv2d) and name.rpartition(".")[0] not in blocks:
            yield name, [cast(Tensor, module.bias), module.weight]
