"""Finds dense blocks and their transitions: torchvision's and timm's by type, others by proof."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from dlkernels.accelerate.match import (
    Match,
    follow_mode,
    known_type,
    shared_differences,
    subclass_difference,
    type_name,
    whole,
)
from dlkernels.accelerate.proof import difference_from, random_maps
from dlkernels.dense_block.modules import DenseBlock, Transition

# The dense blocks that are understood, and the type of their layers.
DENSE_BLOCKS = {
    "torchvision.models.densenet._DenseBlock": "torchvision.models.densenet._DenseLayer",
    "timm.models.densenet.DenseBlock": "timm.models.densenet.DenseLayer",
}
TRANSITIONS = ("torchvision.models.densenet._Transition", "timm.models.densenet.DenseTransition")
BATCH_NORMS = {
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "timm.layers.norm_act.BatchNormAct2d",
}
PARTS = ("norm1", "conv1", "norm2", "conv2")


def matches(module: nn.Module, memory: str) -> Iterator[Match]:
    """The module, if it is a dense block or a transition; ``memory`` is the block's."""
    kind = known_type(module, DENSE_BLOCKS)
    if kind is not None:
        reasons = _reasons(module, kind)
        yield from whole(reasons, lambda: _fused(module, memory), "dlkernels.nn.DenseBlock")
    elif (kind := known_type(module, TRANSITIONS)) is not None:
        reasons = _reasons_against_transition(module, kind)
        yield from whole(reasons, lambda: _fused_transition(module), "dlkernels.nn.Transition")
    elif _has_dense_layers(module):
        reasons = _reasons_against_unknown(module, memory)
        yield from whole(reasons, lambda: _fused(module, memory), "dlkernels.nn.DenseBlock")


def _reasons(block: nn.Module, kind: str) -> Iterator[str | None]:
    yield subclass_difference(block, kind)
    yield from shared_differences(block)
    for name, layer in block.named_children():
        if type_name(layer) != DENSE_BLOCKS[kind]:
            yield f"its {name} is {type_name(layer)}"
        else:
            yield from _layer_differences(name, layer)


def _layer_differences(name: str, layer: Any) -> Iterator[str | None]:
    for norm in (layer.norm1, layer.norm2):
        yield _norm_difference(name, norm)
    for conv, kernel in ((layer.conv1, 1), (layer.conv2, 3)):
        if not _is_plain_conv(conv, kernel):
            yield f"its {name} has a convolution that is no plain {kernel}x{kernel} nn.Conv2d"


def _norm_difference(name: str, norm: Any) -> str | None:
    if type_name(norm) not in BATCH_NORMS:
        return f"its {name} has norms of type {type_name(norm)}"
    if not isinstance(getattr(norm, "act", nn.ReLU()), nn.ReLU):
        return f"its {name} has another activation than ReLU"
    if not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity):
        return f"its {name} drops values in a norm"
    if norm.weight is None:
        return f"its {name} has norms without weights"
    return None


def _is_plain_conv(conv: nn.Module, kernel: int) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (kernel, kernel)
        and conv.padding == (kernel // 2, kernel // 2)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.bias is None
        and conv.padding_mode == "zeros"
    )


def _fused(block: nn.Module, memory: str) -> nn.Module:
    container, layers = _layers_of(block)
    checkpoints = any(
        getattr(layer, name, False)
        for layer in layers.values()
        for name in ("memory_efficient", "grad_checkpointing")
    )
    fused = DenseBlock.from_layers(layers, memory="minimal" if checkpoints else memory)
    if not container:
        return follow_mode(fused, block)
    return follow_mode(nn.Sequential(OrderedDict([(container, fused)])), block)


def _layers_of(block: nn.Module) -> tuple[str, dict[str, nn.Module]]:
    """The block's layers, and the name of the one list that holds them, or ''."""
    children = dict(block.named_children())
    only = next(iter(children.values()), None)
    if len(children) == 1 and isinstance(only, nn.ModuleList):
        return next(iter(children)), dict(only.named_children())
    return "", children


# ---- transitions ---------------------------------------------------------------------------------


def _reasons_against_transition(module: Any, kind: str) -> Iterator[str | None]:
    yield subclass_difference(module, kind)
    yield from shared_differences(module)
    names = list(dict(module.named_children()))
    if names not in (["norm", "relu", "conv", "pool"], ["norm", "conv", "pool"]):
        yield f"it consists of {', '.join(names)}"
        return
    yield _norm_difference("transition", module.norm)
    if hasattr(module.norm, "act") == ("relu" in names):
        yield "it has not exactly one activation"
    if type(getattr(module, "relu", nn.ReLU())) is not nn.ReLU:
        yield "it has another activation than ReLU"
    if not _is_plain_conv(module.conv, 1):
        yield "its convolution is no plain 1x1 nn.Conv2d"
    pool = module.pool
    plain = type(pool) is nn.AvgPool2d and (pool.padding, pool.ceil_mode) == (0, False)
    if not plain or pool.kernel_size != 2 or pool.stride != 2 or pool.divisor_override:
        yield "it does not end in an average pool of 2x2"


def _fused_transition(module: Any) -> nn.Module:
    return follow_mode(Transition.from_layers(module.norm, module.conv), module)


# ---- hand-written blocks -------------------------------------------------------------------------


def _has_dense_layers(module: nn.Module) -> bool:
    """Whether all children are like torchvision's dense layers, by their attributes."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or type_name(module).startswith(
        "dlkernels."
    ):
        return False
    _, layers = _layers_of(module)
    return bool(layers) and all(
        all(isinstance(getattr(layer, part, None), nn.Module) for part in PARTS)
        for layer in layers.values()
    )


def _reasons_against_unknown(block: nn.Module, memory: str) -> Iterator[str | None]:
    yield from shared_differences(block)
    _, layers = _layers_of(block)
    for name, layer in layers.items():
        extra = {name for name, _ in layer.named_parameters()} - _parameters_of_parts(layer)
        if extra:
            yield f"its {name} has more parameters: {', '.join(sorted(extra))}"
        yield from _layer_differences(name, layer)
        if any(isinstance(child, nn.modules.dropout._DropoutNd) for child in layer.modules()):
            yield f"its {name} has dropout, which no random input can compare"
    channels = next(iter(layers.values())).get_parameter("conv1.weight").shape[1]
    inputs = [random_maps((2, channels, 5, 3)), random_maps((3, channels, 4, 4))]
    yield difference_from(block, partial(_fused, memory=memory), inputs)


def _parameters_of_parts(layer: nn.Module) -> set[str]:
    return {
        f"{part}.{name}"
        for part in PARTS
        for name, _ in layer.get_submodule(part).named_parameters()
    }
