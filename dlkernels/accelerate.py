"""Swaps fused modules into a model that exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dlkernels.dense_block.modules import DenseBlock
from dlkernels.mbconv.modules import MBConv
from dlkernels.squeeze_excite.modules import SqueezeExcite

ACTIVATIONS = {"ReLU": "relu", "SiLU": "silu", "Swish": "silu"}
GATES = {"Sigmoid": "sigmoid", "Hardsigmoid": "hard_sigmoid", "HardSigmoid": "hard_sigmoid"}

# The SE modules that are understood: the names of their first layer, activation, second layer and
# gate. The exact type decides, since a subclass may compute something else.
SQUEEZE_EXCITE = {
    "torchvision.ops.misc.SqueezeExcitation": ("fc1", "activation", "fc2", "scale_activation"),
    "timm.layers.squeeze_excite.SEModule": ("fc1", "act", "fc2", "gate"),
    "timm.models.senet.SEModule": ("fc1", "relu", "fc2", "sigmoid"),
    "timm.models._efficientnet_blocks.SqueezeExcite": (
        "conv_reduce",
        "act1",
        "conv_expand",
        "gate",
    ),
}
# The dense blocks that are understood, and the type of their layers.
DENSE_BLOCKS = {
    "torchvision.models.densenet._DenseBlock": "torchvision.models.densenet._DenseLayer",
    "timm.models.densenet.DenseBlock": "timm.models.densenet.DenseLayer",
}
BATCH_NORMS = {
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "timm.layers.norm_act.BatchNormAct2d",
}
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
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NOT_SUPPORTED = {
    "timm.layers.squeeze_excite.EffectiveSEModule": "it has one layer, not two",
    "timm.layers.squeeze_excite.SqueezeExciteCl": "it takes maps of shape [N, H, W, C]",
}


@dataclass
class Report:
    """What :func:`accelerate` did.

    Attributes:
        model: the model, changed in place.
        swapped: for each swapped module its name and the original.
        left: for each module that was left its name and the reason.
    """

    model: nn.Module
    swapped: dict[str, nn.Module] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def restore(self) -> nn.Module:
        """Puts the original modules back, in the model's mode, and returns the model."""
        for name, original in self.swapped.items():
            _follow_mode(original, self.model.get_submodule(name))
            _replace(self.model, name, original)
        self.swapped.clear()
        return self.model

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} modules swapped, {len(self.left)} left"]
        lines += [f"  swapped {name}: {_type_name(old)}" for name, old in self.swapped.items()]
        lines += [f"  left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Replaces blocks of a torchvision or timm model by fused ones, in place.

    These are squeeze-excite modules, dense blocks, and the inverted residual blocks of
    EfficientNet, MobileNetV2, MobileNetV3 and MNASNet. A dense block whose layers checkpoint gets
    ``memory="minimal"``, others ``"balanced"``.

    The new modules hold the very layers, and so the Parameter objects and state-dict keys, of the
    old ones: an optimizer that exists stays valid. What can't be proven equal is left.

    Args:
        model: any module; the modules inside it are found by their exact types.

    Returns:
        The report, whose ``restore()`` undoes the swaps.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    report = Report(model)
    fused: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if any(name.startswith(f"{swapped}.") for swapped in report.swapped):
            continue
        reason = _reason_to_leave(name, module)
        if reason is not None:
            report.left[name or "(the model itself)"] = reason
        elif _type_name(module) in FUSE:
            # A module that the model uses in two places stays one module.
            if id(module) not in fused:
                fused[id(module)] = FUSE[_type_name(module)](module)
            report.swapped[name] = module
            _replace(model, name, fused[id(module)])
    return report


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _follow_mode(module: Any, other: nn.Module) -> Any:
    """Gives ``module`` the mode of ``other``; layers that both hold keep theirs: frozen norms."""
    shared = {id(child) for child in other.modules()}
    for child in module.modules():
        if id(child) not in shared:
            child.training = other.training
    return module


def _reason_to_leave(name: str, module: nn.Module) -> str | None:
    kind = _type_name(module)
    if kind in NOT_SUPPORTED:
        return NOT_SUPPORTED[kind]
    if kind not in FUSE:
        return None
    if not name:
        return f"it is the model itself; use {FUSED_NAMES[FUSE[kind]]} in its place"
    reasons = (*_shared_differences(module), *_own_differences(kind, module))
    return next((reason for reason in reasons if reason is not None), None)


def _own_differences(kind: str, module: nn.Module) -> Iterator[str | None]:
    if kind in BLOCKS:
        return _block_differences(module)
    return (
        _dense_differences(module) if kind in DENSE_BLOCKS else _squeeze_excite_differences(module)
    )


def _shared_differences(module: nn.Module) -> Iterator[str]:
    for child in module.modules():
        if any(getattr(child, hooks) for hooks in HOOKS):
            yield "it has hooks, which the fused module would not call"
        if hasattr(child, "parametrizations"):
            yield "its parameters are parametrized"


def _dense_differences(block: nn.Module) -> Iterator[str | None]:
    """Reasons why a dense block of a known type differs from the formula."""
    layer: Any
    for name, layer in block.named_children():
        if _type_name(layer) != DENSE_BLOCKS[_type_name(block)]:
            yield f"its {name} is {_type_name(layer)}"
            continue
        for norm in (layer.norm1, layer.norm2):
            if _type_name(norm) not in BATCH_NORMS:
                yield f"its {name} has norms of type {_type_name(norm)}"
            elif not isinstance(getattr(norm, "act", nn.ReLU()), nn.ReLU):
                yield f"its {name} has another activation than ReLU"
            elif norm.weight is None:
                yield f"its {name} has norms without weights"
        for conv, kernel in ((layer.conv1, 1), (layer.conv2, 3)):
            if not _is_plain_conv(conv, kernel):
                yield f"its {name} has a convolution that is no plain {kernel}x{kernel} nn.Conv2d"


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


def _squeeze_excite_differences(module: nn.Module) -> Iterator[str | None]:
    """Reasons why a module of a known type differs from the formula."""
    reduce, activation, expand, gate = SQUEEZE_EXCITE[_type_name(module)]
    if getattr(module, "add_maxpool", False):
        yield "it adds a max pool to the average"
    if not isinstance(getattr(module, "bn", nn.Identity()), nn.Identity):
        yield "it has a norm between its layers"
    pool = getattr(module, "avgpool", None)
    if pool is not None and pool.output_size not in (1, (1, 1)):
        yield f"it pools to {pool.output_size}, not to one value"
    for name in (reduce, expand):
        yield _layer_difference(name, getattr(module, name))
    yield _choice_difference(activation, getattr(module, activation), ACTIVATIONS)
    yield _choice_difference(gate, getattr(module, gate), GATES)


def _layer_difference(name: str, layer: nn.Module) -> str | None:
    plain = type(layer) is nn.Linear or (
        type(layer) is nn.Conv2d
        and layer.kernel_size == layer.stride == (1, 1)
        and layer.padding in ((0, 0), 0)
        and layer.groups == 1
    )
    return None if plain else f"its layer {name} is neither nn.Linear nor a plain 1x1 nn.Conv2d"


def _choice_difference(name: str, module: nn.Module, known: dict[str, str]) -> str | None:
    kind = _type_name(module)
    if type(module).__name__ in known and kind.startswith(("torch.nn.", "timm.layers.")):
        return None
    return f"its {name} is {kind}, not one of {', '.join(known)}"


def _fuse_squeeze_excite(module: nn.Module) -> SqueezeExcite:
    names = SQUEEZE_EXCITE[_type_name(module)]
    reduce, activation, expand, gate = (getattr(module, name) for name in names)
    fused = SqueezeExcite.from_layers(
        reduce,
        expand,
        (names[0], names[2]),
        activation=ACTIVATIONS[type(activation).__name__],
        gate=GATES[type(gate).__name__],
    )
    return _follow_mode(fused, module)


def _fuse_dense_block(block: nn.Module) -> DenseBlock:
    checkpoints = any(
        getattr(layer, name, False)
        for layer in block.children()
        for name in ("memory_efficient", "grad_checkpointing")
    )
    memory = "minimal" if checkpoints else "balanced"
    fused = DenseBlock.from_layers(dict(block.named_children()), memory=memory)
    return _follow_mode(fused, block)


# ---- inverted residual blocks -------------------------------------------------------------------


def _steps(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What a block applies one after the other, with names; an activation in a norm follows it."""
    for name, child in module.named_children():
        kind = _type_name(child)
        if kind in SQUEEZE_EXCITE or kind in CONVOLUTIONS or kind in BATCH_NORMS:
            yield prefix + name, child
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
    convolutions = [step for step in steps if _type_name(step[1]) in CONVOLUTIONS]
    roles = ["expand", "depthwise", "project"][-len(convolutions) :]
    if len(convolutions) not in (2, 3):
        return None
    block = _Block()
    role = ""
    for name, child in steps:
        kind = _type_name(child)
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


def _block_differences(module: nn.Module) -> Iterator[str | None]:
    """Reasons why a block of a known type differs from MBConv."""
    block = _parse_block(module)
    if block is None:
        yield "it does not consist of expansion, depthwise convolution and projection"
        return
    if block.squeeze_excite is not None:
        yield from _squeeze_excite_differences(block.squeeze_excite)
    for part in ("expand", "project"):
        if part in block.parts:
            yield _layer_difference(part, block.parts[part])
            if getattr(block.parts[part], "bias", None) is not None:
                yield f"its {part} has a bias"
    conv = block.parts["depthwise"]
    assert isinstance(conv, nn.Conv2d)
    size, stride = conv.kernel_size, conv.stride
    if conv.groups != conv.in_channels or conv.groups != conv.out_channels:
        yield "its convolution has other groups than channels"
    if size not in ((3, 3), (5, 5), (7, 7)) or stride not in ((1, 1), (2, 2)):
        yield f"its depthwise convolution has size {size} and stride {stride}"
    if conv.dilation != (1, 1) or conv.bias is not None or conv.padding_mode != "zeros":
        yield "its depthwise convolution is dilated, has a bias or does not pad with zeros"
    activations = {role: type(child).__name__ for role, child in block.activations.items()}
    if activations.pop("project", "Identity") != "Identity":
        yield "it has an activation behind the projection"
    if len({activations.get(role) for role in ("expand", "depthwise") if role in block.parts}) > 1:
        yield "its activations differ"
    yield _choice_difference("activation", block.activations["depthwise"], BLOCK_ACTIVATIONS)


def _fuse_block(module: nn.Module) -> MBConv:
    block = _parse_block(module)
    assert block is not None
    options = {}
    if block.squeeze_excite is not None:
        _, activation, _, gate = SQUEEZE_EXCITE[_type_name(block.squeeze_excite)]
        options = {
            "squeeze_activation": ACTIVATIONS[
                type(getattr(block.squeeze_excite, activation)).__name__
            ],
            "gate": GATES[type(getattr(block.squeeze_excite, gate)).__name__],
        }
    fused = MBConv.from_parts(
        block.parts,
        block.names,
        residual=bool(getattr(module, BLOCKS[_type_name(module)])),
        activation=BLOCK_ACTIVATIONS[type(block.activations["depthwise"]).__name__],
        drop_path=_drop_path(module),
        same_padding=_type_name(block.parts["depthwise"]) == CONVOLUTIONS[1],
        **options,
    )
    return _follow_mode(fused, module)


def _drop_path(module: nn.Module) -> float:
    """The probability of the block's stochastic depth, as torchvision or timm name it."""
    torchvisions = getattr(getattr(module, "stochastic_depth", None), "p", 0.0)
    return torchvisions or getattr(getattr(module, "drop_path", None), "drop_prob", None) or 0.0


FUSE: dict[str, Callable[[nn.Module], nn.Module]] = {
    **dict.fromkeys(SQUEEZE_EXCITE, _fuse_squeeze_excite),
    **dict.fromkeys(DENSE_BLOCKS, _fuse_dense_block),
    **dict.fromkeys(BLOCKS, _fuse_block),
}
FUSED_NAMES = {
    _fuse_squeeze_excite: "dlkernels.nn.SqueezeExcite",
    _fuse_dense_block: "dlkernels.nn.DenseBlock",
    _fuse_block: "dlkernels.nn.MBConv",
}
