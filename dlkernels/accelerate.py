"""Swaps fused modules into a model that exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dlkernels.dense_block.modules import DenseBlock
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
            original.train(self.model.get_submodule(name).training)
            _replace(self.model, name, original)
        self.swapped.clear()
        return self.model

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} modules swapped, {len(self.left)} left"]
        lines += [f"  swapped {name}: {_type_name(old)}" for name, old in self.swapped.items()]
        lines += [f"  left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Replaces squeeze-excite modules and dense blocks of a torchvision or timm model, in place.

    A dense block whose layers checkpoint gets ``memory="minimal"``, others ``"balanced"``.

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


def _reason_to_leave(name: str, module: nn.Module) -> str | None:
    kind = _type_name(module)
    if kind in NOT_SUPPORTED:
        return NOT_SUPPORTED[kind]
    if kind not in FUSE:
        return None
    if not name:
        return f"it is the model itself; use {FUSED_NAMES[FUSE[kind]]} in its place"
    find = _dense_differences if kind in DENSE_BLOCKS else _squeeze_excite_differences
    reasons = (*_shared_differences(module), *find(module))
    return next((reason for reason in reasons if reason is not None), None)


def _shared_differences(module: nn.Module) -> Iterator[str]:
    for child in module.modules():
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks:
            yield "it has hooks, which the fused module would not call"
        if hasattr(child, "parametrizations"):
            yield "its parameters are parametrized"


def _dense_differences(block: nn.Module) -> Iterator[str]:
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
    return fused.train(module.training)


def _fuse_dense_block(block: nn.Module) -> DenseBlock:
    checkpoints = any(
        getattr(layer, name, False)
        for layer in block.children()
        for name in ("memory_efficient", "grad_checkpointing")
    )
    memory = "minimal" if checkpoints else "balanced"
    fused = DenseBlock.from_layers(dict(block.named_children()), memory=memory)
    return fused.train(block.training)


FUSE: dict[str, Callable[[nn.Module], nn.Module]] = {
    **dict.fromkeys(SQUEEZE_EXCITE, _fuse_squeeze_excite),
    **dict.fromkeys(DENSE_BLOCKS, _fuse_dense_block),
}
FUSED_NAMES = {
    _fuse_squeeze_excite: "dlkernels.nn.SqueezeExcite",
    _fuse_dense_block: "dlkernels.nn.DenseBlock",
}
