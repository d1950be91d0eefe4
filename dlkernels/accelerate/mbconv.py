"""Finds the inverted residual blocks of torchvision and timm, by type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from dlkernels.accelerate import squeeze_excite
from dlkernels.accelerate.dense_block import BATCH_NORMS
from dlkernels.accelerate.match import (
    Match,
    choice_difference,
    follow_mode,
    known_type,
    shared_differences,
    subclass_difference,
    type_name,
    whole,
)
from dlkernels.accelerate.squeeze_excite import SQUEEZE_EXCITE, pointwise_difference
from dlkernels.mbconv.modules import MBConv

# The inverted residual blocks that are understood: where each says that it adds its input.
BLOCKS = {
    "torchvision.models.efficientnet.MBConv": "use_res_connect",
    "torchvision.models.mobilenetv2.InvertedResidual": "use_res_connect",
    "torchvision.models.mobilenetv3.InvertedResidual": "use_res_connect",
    "torchvision.models.mnasnet._InvertedResidual": "apply_residual",
    "timm.models._efficientnet_blocks.InvertedResidual": "has_skip",
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": "has_skip",
}
BLOCK_ACTIVATIONS = {
    "Identity": "identity",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "SiLU": "silu",
    "Swish": "silu",
    "Hardswish": "hardswish",
    "HardSwish": "hardswish",
    "Mish": "mish",
}
CONVOLUTIONS = ("torch.nn.modules.conv.Conv2d", "timm.layers.conv2d_same.Conv2dSame")
# Modules without parameters that the block's own options stand for.
DROPS = ("StochasticDepth", "DropPath", "Identity", "Dropout")


def matches(module: nn.Module) -> Iterator[Match]:
    """The module, if it is an inverted residual block."""
    kind = known_type(module, BLOCKS)
    if kind is not None:
        reasons = _reasons(module, kind)
        yield from whole(reasons, lambda: _fused(module, kind), "dlkernels.nn.MBConv")


def _steps(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What a block applies one after the other, with names; an activation in a norm follows it."""
    for name, child in module.named_children():
        kind = type_name(child)
        if kind in SQUEEZE_EXCITE or kind in CONVOLUTIONS or kind in BATCH_NORMS:
            yield prefix + name, child
            if not isinstance(getattr(child, "drop", nn.Identity()), nn.Identity):
                yield f"{prefix}{name}.drop", child.drop  # type: ignore[misc]
            if kind == "timm.layers.norm_act.BatchNormAct2d":
                yield f"{prefix}{name}.act", child.act  # type: ignore[misc]
        elif next(child.children(), None) is not None:
            yield from _steps(child, f"{prefix}{name}.")
        elif type(child).__name__ not in DROPS:
            yield prefix + name, child


@dataclass
class _Block:
    """The parts of a block as MBConv names them, and the activation after each norm."""

    parts: dict[str, nn.Module] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    activations: dict[str, nn.Module] = field(default_factory=dict)
    squeeze_excite: nn.Module | None = None

    def add(self, part: str, name: str, module: nn.Module) -> None:
        self.parts[part] = module
        self.names[part] = name


def _parse_block(module: nn.Module) -> _Block | None:
    """The block's parts, or None if it does not consist of them."""
    steps = list(_steps(module))
    convolutions = [step for step in steps if type_name(step[1]) in CONVOLUTIONS]
    roles = ["expand", "depthwise", "project"][-len(convolutions) :]
    if len(convolutions) not in (2, 3):
        return None
    block = _Block()
    role = ""
    for name, child in steps:
        kind = type_name(child)
        if kind in CONVOLUTIONS:
            role = roles.pop(0)
            block.add(role, name, child)
        elif kind in BATCH_NORMS and role and f"{role}_norm" not in block.parts:
            block.add(f"{role}_norm", name, child)
        elif kind in SQUEEZE_EXCITE and role == "depthwise" and block.squeeze_excite is None:
            squeeze, _, excite, _ = SQUEEZE_EXCITE[kind]
            block.squeeze_excite = child
            block.add("squeeze", f"{name}.{squeeze}", getattr(child, squeeze))
            block.add("excite", f"{name}.{excite}", getattr(child, excite))
        elif f"{role}_norm" in block.parts and role not in block.activations:
            block.activations[role] = child
        else:
            return None
    parts = set(block.parts)
    convolved = parts & {"expand", "depthwise", "project"}
    complete = "depthwise" in block.activations and all(
        f"{part}_norm" in parts for part in convolved
    )
    return block if complete else None


def _reasons(module: nn.Module, kind: str) -> Iterator[str | None]:
    yield subclass_difference(module, kind)
    yield from shared_differences(module)
    yield from _drop_differences(module)
    block = _parse_block(module)
    if block is None:
        yield "it does not consist of expansion, depthwise convolution and projection"
        return
    if block.squeeze_excite is not None:
        yield from squeeze_excite.differences(block.squeeze_excite)
    for part in ("expand", "project"):
        if part in block.parts:
            yield pointwise_difference(part, block.parts[part])
            if getattr(block.parts[part], "bias", None) is not None:
                yield f"its {part} has a bias"
    yield from _depthwise_differences(block.parts["depthwise"])
    activations = {role: type(child).__name__ for role, child in block.activations.items()}
    if activations.pop("project", "Identity") != "Identity":
        yield "it has an activation behind the projection"
    if len({activations.get(role) for role in ("expand", "depthwise") if role in block.parts}) > 1:
        yield "its activations differ"
    yield choice_difference("activation", block.activations["depthwise"], BLOCK_ACTIVATIONS)


def _depthwise_differences(conv: nn.Module) -> Iterator[str]:
    assert isinstance(conv, nn.Conv2d)
    size, stride = conv.kernel_size, conv.stride
    if conv.groups != conv.in_channels or conv.groups != conv.out_channels:
        yield "its convolution has other groups than channels"
    if size not in ((3, 3), (5, 5), (7, 7)) or stride not in ((1, 1), (2, 2)):
        yield f"its depthwise convolution has size {size} and stride {stride}"
    if conv.dilation != (1, 1) or conv.bias is not None or conv.padding_mode != "zeros":
        yield "its depthwise convolution is dilated, has a bias or does not pad with zeros"


def _drop_differences(module: nn.Module) -> Iterator[str]:
    """Reasons among what drops values: the fused block drops whole samples, in its own mode."""
    for child in module.modules():
        kind = type(child).__name__
        if kind not in DROPS or kind == "Identity":
            continue
        if kind == "Dropout" or getattr(child, "mode", "row") != "row":
            yield "it drops single values or whole batches, not samples"
        elif not getattr(child, "scale_by_keep", True):
            yield "its stochastic depth does not scale what it keeps"
        elif child.training != module.training:
            yield "its stochastic depth is in another mode than the block"


def _fused(module: nn.Module, kind: str) -> MBConv:
    block = _parse_block(module)
    assert block is not None
    options = {}
    if block.squeeze_excite is not None:
        names = squeeze_excite.layer_names(block.squeeze_excite)
        options = squeeze_excite.activation_and_gate(block.squeeze_excite, names)
        options["squeeze_activation"] = options.pop("activation")
    fused = MBConv.from_parts(
        block.parts,
        block.names,
        residual=bool(getattr(module, BLOCKS[kind])),
        activation=BLOCK_ACTIVATIONS[type(block.activations["depthwise"]).__name__],
        drop_path=_drop_path(module),
        same_padding=type_name(block.parts["depthwise"]) == CONVOLUTIONS[1],
        **options,
    )
    return follow_mode(fused, module)


def _drop_path(module: nn.Module) -> float:
    """The probability of the block's stochastic depth, as torchvision or timm name it."""
    torchvisions = getattr(getattr(module, "stochastic_depth", None), "p", 0.0)
    return torchvisions or getattr(getattr(module, "drop_path", None), "drop_prob", None) or 0.0
