"""Finds the fusion modules of the published YOLOv3-ASFF, by their layers and by proof."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from dlkernels.accelerate.match import Match, follow_mode, shared_differences, type_name, whole
from dlkernels.accelerate.proof import difference_from, random_maps
from dlkernels.asff.modules import ASFF

ALWAYS = {"weight_level_0", "weight_level_1", "weight_level_2", "weight_levels", "expand"}
LEVELS = {
    0: {"stride_level_1", "stride_level_2"},
    1: {"compress_level_0", "stride_level_2"},
    2: {"compress_level_0", "compress_level_1"},
}


def matches(module: nn.Module) -> Iterator[Match]:
    """The module, if it has the layers of the published module at its level."""
    children = {name for name, _ in module.named_children()}
    level = getattr(module, "level", None)
    if type_name(module).startswith("dlkernels.") or not children >= ALWAYS or level not in LEVELS:
        return
    yield from whole(_reasons(module, level), lambda: _fused(module), "dlkernels.nn.ASFF")


def _reasons(module: Any, level: int) -> Iterator[str | None]:
    yield from shared_differences(module)
    names = {name for name, _ in module.named_children()}
    # Where widths are equal the published code does not compress level 1.
    if names - ALWAYS not in (LEVELS[level], LEVELS[level] - {"compress_level_1"}):
        yield f"it has the layers {', '.join(sorted(names))}"
    for name in names - {"weight_levels"}:
        steps = [step for step, _ in module.get_submodule(name).named_children()]
        if steps[:2] != ["conv", "batch_norm"] or len(steps) != 3:
            yield f"its {name} does not consist of conv, batch_norm and an activation"
    if getattr(module, "vis", False):
        yield "it returns the fusion weights, too"
    widths = _channels(module)
    inputs = random_maps(*((2, width, 2 << i, 1 << i) for i, width in enumerate(widths)))
    yield difference_from(module, _fused, [inputs])


def _channels(module: Any) -> tuple[int, ...]:
    """The widths of levels 0 to 2, from the layers that read them."""

    def width(index: int) -> int:
        name = "compress" if index < module.level else "stride"
        layer = f"{name}_level_{index}"
        reader = module.expand if not hasattr(module, layer) else module.get_submodule(layer)
        return int(reader.conv.in_channels)

    return tuple(width(index) for index in range(3))


def _fused(module: Any) -> nn.Module:
    layers = dict(module.named_children())
    return follow_mode(ASFF.from_layers(layers, module.level, _channels(module)), module)
