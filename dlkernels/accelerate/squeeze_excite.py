"""Finds squeeze-excite modules: those of torchvision and timm by type, others by proof."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from dlkernels.accelerate.match import (
    Match,
    choice_difference,
    follow_mode,
    is_known_activation,
    known_type,
    shared_differences,
    subclass_difference,
    type_name,
    whole,
)
from dlkernels.accelerate.proof import difference_from, random_maps
from dlkernels.squeeze_excite.modules import SqueezeExcite

ACTIVATIONS = {"ReLU": "relu", "SiLU": "silu", "Swish": "silu"}
GATES = {"Sigmoid": "sigmoid", "Hardsigmoid": "hard_sigmoid", "HardSigmoid": "hard_sigmoid"}

# The SE modules that are understood: the names of their first layer, activation, second layer and
# gate.
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
NOT_SUPPORTED = {
    "timm.layers.squeeze_excite.EffectiveSEModule": "it has one layer, not two",
    "timm.layers.squeeze_excite.SqueezeExciteCl": "it takes maps of shape [N, H, W, C]",
}
# Attributes of the fused module, which its layers cannot be named like.
OPTIONS = ("names", "activation", "gate", "output_activation", "reduce", "expand")
DROP_IN = "dlkernels.nn.SqueezeExcite"
Names = tuple[str, str, str, str]


def matches(module: nn.Module) -> Iterator[Match]:
    """The module, if it is squeeze-and-excitation."""
    if type_name(module) in NOT_SUPPORTED:
        yield Match(("",), NOT_SUPPORTED[type_name(module)], tuple, DROP_IN)
        return
    kind = known_type(module, SQUEEZE_EXCITE)
    if kind is not None:
        names = SQUEEZE_EXCITE[kind]
        yield from whole(_reasons(module, kind), lambda: _fused(module, names), DROP_IN)
        return
    classic = _classic_names(module)
    if classic is not None:
        reasons = _reasons_against_classic(module, classic)
        yield from whole(reasons, lambda: _fused(module, classic), DROP_IN)


def _reasons(module: nn.Module, kind: str) -> Iterator[str | None]:
    yield subclass_difference(module, kind)
    yield from shared_differences(module)
    yield from differences(module)


def differences(module: nn.Module) -> Iterator[str | None]:
    """Reasons why a module of a known type differs from the formula."""
    names = layer_names(module)
    if getattr(module, "add_maxpool", False):
        yield "it adds a max pool to the average"
    if not isinstance(getattr(module, "bn", nn.Identity()), nn.Identity):
        yield "it has a norm between its layers"
    pool = getattr(module, "avgpool", None)
    if pool is not None and pool.output_size not in (1, (1, 1)):
        yield f"it pools to {pool.output_size}, not to one value"
    yield from _layer_differences(module, names)


def layer_names(module: nn.Module) -> Names:
    """The names of first layer, activation, second layer and gate in a module of a known type."""
    return SQUEEZE_EXCITE[known_type(module, SQUEEZE_EXCITE) or ""]


def activation_and_gate(module: nn.Module, names: Names) -> dict[str, str]:
    """Both as the fused ops name them."""
    activation, gate = module.get_submodule(names[1]), module.get_submodule(names[3])
    return {
        "activation": ACTIVATIONS[type(activation).__name__],
        "gate": GATES[type(gate).__name__],
    }


def _layer_differences(module: nn.Module, names: Names) -> Iterator[str | None]:
    reduce, activation, expand, gate = names
    for name in (reduce, expand):
        yield pointwise_difference(name, module.get_submodule(name))
    yield choice_difference(activation, module.get_submodule(activation), ACTIVATIONS)
    yield choice_difference(gate, module.get_submodule(gate), GATES)


def pointwise_difference(name: str, layer: nn.Module) -> str | None:
    """Why the layer is no matrix of channels, or None if it is."""
    plain = type(layer) is nn.Linear or (
        type(layer) is nn.Conv2d
        and layer.kernel_size == layer.stride == (1, 1)
        and layer.padding in ((0, 0), 0)
        and layer.groups == 1
    )
    return None if plain else f"its layer {name} is neither nn.Linear nor a plain 1x1 nn.Conv2d"


def _fused(module: nn.Module, names: Names) -> SqueezeExcite:
    fused = SqueezeExcite.from_layers(
        module.get_submodule(names[0]),  # type: ignore[arg-type]
        module.get_submodule(names[2]),  # type: ignore[arg-type]
        (names[0], names[2]),
        **activation_and_gate(module, names),
    )
    return follow_mode(fused, module)


# ---- the classic SELayer -------------------------------------------------------------------------


def _classic_names(module: nn.Module) -> Names | None:
    """The layers of a module that consists of an average pool and a sequence of four modules."""
    children = dict(module.named_children())
    pools = [name for name, child in children.items() if type(child) is nn.AdaptiveAvgPool2d]
    sequences = [name for name, child in children.items() if type(child) is nn.Sequential]
    if len(children) != 2 or len(pools) != 1 or len(sequences) != 1:
        return None
    name = sequences[0]
    steps = list(children[name].named_children())
    layers = [type(step) in (nn.Linear, nn.Conv2d) for _, step in steps]
    if layers != [True, False, True, False] or not is_known_activation(steps[3][1], GATES):
        return None
    reduce, activation, expand, gate = (f"{name}.{step}" for step, _ in steps)
    return reduce, activation, expand, gate


def _reasons_against_classic(module: nn.Module, names: Names) -> Iterator[str | None]:
    yield from shared_differences(module)
    yield from _layer_differences(module, names)
    parent = names[0].partition(".")[0]
    if parent in OPTIONS:
        yield f"its layers are in {parent!r}, which is an option of the fused module"
    channels = module.get_submodule(names[0]).get_parameter("weight").shape[1]
    inputs = [random_maps((2, channels, 5, 3)), random_maps((3, channels, 4, 4))]
    yield difference_from(module, lambda copy: _fused(copy, names), inputs)
