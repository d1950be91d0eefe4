"""Finds the residual blocks of torchvision and timm, by type."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from dlkernels.accelerate import squeeze_excite
from dlkernels.accelerate.batch_norm_act import ACTIVATIONS, NORM_ACT
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
from dlkernels.accelerate.squeeze_excite import SQUEEZE_EXCITE
from dlkernels.residual_block.modules import LAYERS, ResidualBlock


class _Layout(NamedTuple):
    """Where a block has its parts.

    Attributes:
        layers: for each convolution its name, its norm's and that of the activation after it.
        output: the activation after the sum.
        squeeze_excite: the module, if there is one.
        place: where it stands, see ``ResidualBlock``.
        shortcut: the module, if there is one.
        others: modules that must be missing or do nothing, and what they would do.
    """

    layers: tuple[tuple[str, str, str | None], ...]
    output: str
    squeeze_excite: str
    place: str
    shortcut: str
    others: Mapping[str, str] = {}


_TIMM = {
    "aa": "anti-aliasing",
    "drop_block": "DropBlock",
    "drop_path": "stochastic depth",
}
_TWO = (("conv1", "bn1", "relu"), ("conv2", "bn2", None))
_THREE = (("conv1", "bn1", "relu"), ("conv2", "bn2", "relu"), ("conv3", "bn3", None))
_LEGACY = _Layout(_THREE, "relu", "se_module", "last", "downsample")
# The residual blocks that are understood.
BLOCKS = {
    "torchvision.models.resnet.BasicBlock": _Layout(_TWO, "relu", "", "last", "downsample"),
    "torchvision.models.resnet.Bottleneck": _Layout(_THREE, "relu", "", "last", "downsample"),
    "torchvision.models.regnet.ResBottleneckBlock": _Layout(
        (("f.a.0", "f.a.1", "f.a.2"), ("f.b.0", "f.b.1", "f.b.2"), ("f.c.0", "f.c.1", None)),
        "activation",
        "f.se",
        "before_last",
        "proj",
    ),
    "timm.models.resnet.BasicBlock": _Layout(
        (("conv1", "bn1", "act1"), ("conv2", "bn2", None)),
        "act2",
        "se",
        "last",
        "downsample",
        _TIMM,
    ),
    "timm.models.resnet.Bottleneck": _Layout(
        (("conv1", "bn1", "act1"), ("conv2", "bn2", "act2"), ("conv3", "bn3", None)),
        "act3",
        "se",
        "last",
        "downsample",
        _TIMM,
    ),
    "timm.models.regnet.Bottleneck": _Layout(
        (
            ("conv1.conv", "conv1.bn", "conv1.bn.act"),
            ("conv2.conv", "conv2.bn", "conv2.bn.act"),
            ("conv3.conv", "conv3.bn", None),
        ),
        "act3",
        "se",
        "before_last",
        "downsample",
        {
            "drop_path": "stochastic depth",
            **{f"conv{i}.aa": "anti-aliasing" for i in (1, 2, 3)},
            **{f"conv{i}.bn.drop": "DropBlock" for i in (1, 2, 3)},
            "conv3.bn.act": "an activation before the sum",
        },
    ),
    "timm.models.senet.SEBottleneck": _LEGACY,
    "timm.models.senet.SEResNetBottleneck": _LEGACY,
    "timm.models.senet.SEResNeXtBottleneck": _LEGACY,
}
NORMS = ("torch.nn.modules.batchnorm.BatchNorm2d", NORM_ACT)
OUTPUTS = {"ReLU": "relu", "Identity": "identity"}
# Modules that hold the parts of a block and run them one after the other.
FOLDERS = (
    "torchvision.models.regnet.BottleneckTransform",
    "torchvision.ops.misc.Conv2dNormActivation",
    "timm.layers.conv_bn_act.ConvNormAct",
)
INNER = {name: value for name, value in ACTIVATIONS.items() if name != "LeakyReLU"}


def matches(module: nn.Module) -> Iterator[Match]:
    """The module, if it is a residual block."""
    kind = known_type(module, BLOCKS)
    if kind is not None:
        reasons = _reasons(module, kind)
        yield from whole(
            reasons, lambda: _fused(module, BLOCKS[kind]), "dlkernels.nn.ResidualBlock"
        )


def _child(module: nn.Module, name: str) -> Any:
    """The descendant of that name; None where it is missing or does nothing."""
    child: Any = module
    for key in name.split("."):
        child = child._modules.get(key) if isinstance(child, nn.Module) else None
    return None if type(child) is nn.Identity else child


def _reasons(module: nn.Module, kind: str) -> Iterator[str | None]:
    layout = BLOCKS[kind]
    yield subclass_difference(module, kind)
    yield from shared_differences(module)
    yield from _folder_differences(module, layout)
    for name, meaning in layout.others.items():
        if _child(module, name) is not None:
            yield f"it has {meaning} ({name})"
    for conv, norm, activation in layout.layers:
        yield _convolution_difference(conv, _child(module, conv))
        yield _norm_difference(norm, _child(module, norm), activation)
    activations = [_child(module, name) for _, _, name in layout.layers if name is not None]
    for activation in activations:
        yield choice_difference("activation", activation, INNER)
    if len({type(activation) for activation in activations}) > 1:
        yield "its activations differ"
    output = _child(module, layout.output)
    if output is not None:
        yield choice_difference("output activation", output, OUTPUTS)
    excitation = _child(module, layout.squeeze_excite)
    if excitation is not None:
        if type_name(excitation) not in SQUEEZE_EXCITE:
            yield f"its {layout.squeeze_excite} is {type_name(excitation)}, unknown attention"
        yield from squeeze_excite.differences(excitation)
    # timm's RegNets tell an identity from no shortcut.
    if kind == "timm.models.regnet.Bottleneck" and module.downsample is None:
        yield "it has no shortcut"
    if list(_fused(module, layout).state_dict()) != list(module.state_dict()):
        yield "it has other parameters or buffers than those of its known layers"


def _folder_differences(module: nn.Module, layout: _Layout) -> Iterator[str]:
    """Modules on the way to a part, whose own forward the fused block does not call."""
    for part in (name for conv, norm, _ in layout.layers for name in (conv, norm)):
        *folders, _ = part.split(".")
        for depth in range(1, len(folders) + 1):
            name = ".".join(folders[:depth])
            child = _child(module, name)
            if type_name(child) not in FOLDERS:
                yield f"its {name} is {type_name(child)}"


def _convolution_difference(name: str, conv: Any) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"its {name} is {type_name(conv)}, no nn.Conv2d"
    if conv.bias is not None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"its {name} has a bias or does not pad with a number of zeros"
    return None


def _norm_difference(name: str, norm: Any, activation: str | None) -> str | None:
    if type_name(norm) not in NORMS:
        return f"its {name} is {type_name(norm)}, no batch norm"
    if _child(norm, "drop") is not None:
        return f"its {name} drops values"
    if _child(norm, "act") is not None and activation != f"{name}.act":
        return f"its {name} has an activation of its own"
    return None


def _fused(module: nn.Module, layout: _Layout) -> ResidualBlock:
    names: dict[str, str] = {}
    for (conv, norm), (conv_name, norm_name, _) in zip(LAYERS, layout.layers, strict=False):
        names |= {conv: conv_name, norm: norm_name}
    excitation = _child(module, layout.squeeze_excite)
    options = {}
    if excitation is not None:
        layer_names = squeeze_excite.layer_names(excitation)
        options = squeeze_excite.activation_and_gate(excitation, layer_names)
        options["squeeze_activation"] = options.pop("activation")
        for part, name in (("squeeze", layer_names[0]), ("excite", layer_names[2])):
            names[part] = f"{layout.squeeze_excite}.{name}"
    parts = {part: module.get_submodule(name) for part, name in names.items()}
    shortcut = _child(module, layout.shortcut)
    if shortcut is not None:
        names["shortcut"] = layout.shortcut
        parts["shortcut"] = _sequence(shortcut)
    # The order of parameters, which states of optimizers depend on, stays the same.
    order = [name for name, _ in module.named_modules()]
    activation = _child(module, str(layout.layers[0][2]))
    fused = ResidualBlock.from_parts(
        parts,
        dict(sorted(names.items(), key=lambda item: order.index(item[1]))),
        squeeze_place=layout.place,
        activation=INNER[type(activation).__name__],
        output_activation=OUTPUTS[type(module.get_submodule(layout.output)).__name__],
        **options,
    )
    return follow_mode(fused, module)


def _sequence(shortcut: nn.Module) -> nn.Module:
    """A convolution and norm of torchvision as a plain sequence, which the block knows."""
    if type_name(shortcut) != "torchvision.ops.misc.Conv2dNormActivation":
        return shortcut
    return follow_mode(nn.Sequential(OrderedDict(shortcut.named_children())), shortcut)
