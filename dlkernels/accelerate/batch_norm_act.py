"""Finds batch norms and the activations after them.

timm's norms with an activation inside are known by type. A norm and an activation that are two
modules belong together where their parent is a sequence that applies one right after the other, or
where a trace of the parent's own forward shows that nothing else reads the norm's result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx, nn

from dlkernels.accelerate.match import (
    Match,
    follow_mode,
    is_known_activation,
    shared_differences,
    type_name,
    whole,
)
from dlkernels.batch_norm_act.modules import BatchNormAct2d

ACTIVATIONS = {
    "ReLU": "relu",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "SiLU": "silu",
    "Swish": "silu",
    "Hardswish": "hardswish",
    "HardSwish": "hardswish",
    "Mish": "mish",
}
# What a traced forward may call in place of an activation module, which no swap can remove.
CALLS = {"relu", "relu_", "relu6", "leaky_relu", "silu", "hardswish", "mish"}
NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"
DROP_IN = "dlkernels.nn.BatchNormAct2d"


def matches(module: nn.Module) -> Iterator[Match]:
    """The module, if it is timm's norm with an activation, or its children that are such pairs."""
    if type_name(module) == NORM_ACT:
        norm: Any = module
        if type(norm.act) is not nn.Identity:
            reasons = _reasons(norm, norm.act, norm.drop)
            yield from whole(reasons, lambda: _fused(norm, norm.act), DROP_IN)
        return
    if type_name(module).startswith("dlkernels."):
        return
    pairs = _pairs_of_sequence if _is_sequence(module) else _pairs_of_forward
    for pair in pairs(module):
        norm, activation = module.get_submodule(pair.norm), None
        if pair.reason is None:
            activation = module.get_submodule(pair.activation)
        yield _match(pair, norm, activation)


@dataclass(frozen=True)
class _Pair:
    """The names of a norm and of the activation after it, or why there is none to fuse."""

    norm: str
    activation: str
    reason: str | None = None


def _match(pair: _Pair, norm: Any, activation: nn.Module | None) -> Match:
    if activation is None:
        return Match((pair.norm,), pair.reason, tuple, DROP_IN)
    reason = next(_reasons(norm, activation), None)

    def fuse() -> tuple[nn.Module, nn.Module]:
        return _fused(norm, activation), follow_mode(nn.Identity(), activation)

    return Match((pair.norm, pair.activation), reason, fuse, DROP_IN)


def _reasons(norm: nn.Module, activation: nn.Module, drop: nn.Module | None = None) -> Iterator:
    for module in (norm, activation):
        yield from shared_differences(module)
    if drop is not None and type(drop) is not nn.Identity:
        yield "it drops values between norm and activation"
    if not is_known_activation(activation, ACTIVATIONS):
        yield f"its activation is {type_name(activation)}, not one of {', '.join(ACTIVATIONS)}"


def _fused(norm: Any, activation: Any) -> BatchNormAct2d:
    fused = BatchNormAct2d(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        activation=ACTIVATIONS[type(activation).__name__],
        negative_slope=getattr(activation, "negative_slope", 0.01),
        device="meta",
    )
    fused._parameters, fused._buffers = norm._parameters, norm._buffers
    fused.training = norm.training
    return fused


def _is_activation(module: nn.Module) -> bool:
    """Whether the module is an activation, known or not: named like one, without parameters."""
    package = type(module).__module__
    named = package == "torch.nn.modules.activation" or package.startswith("timm.layers.activation")
    return named and next(module.parameters(), None) is None


# ---- sequences -----------------------------------------------------------------------------------


def _is_sequence(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and type(module).__iter__ is nn.Sequential.__iter__
        and type(module).__call__ is nn.Module.__call__
        and "forward" not in vars(module)
    )


def _pairs_of_sequence(module: nn.Module) -> Iterator[_Pair]:
    steps = [(n, m) for n, m in module._modules.items() if type(m) is not nn.Identity]
    for (norm_name, norm), (name, activation) in pairwise(steps):
        if type(norm) is nn.BatchNorm2d and activation is not None and _is_activation(activation):
            yield _Pair(norm_name, name)


# ---- forward functions ---------------------------------------------------------------------------


class _OwnForward(fx.Tracer):
    """Traces a module's own forward; what its children do stays inside them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _pairs_of_forward(module: nn.Module) -> Iterator[_Pair]:
    names = _own_names(module)
    norms = [name for name in names if type(module.get_submodule(name)) is nn.BatchNorm2d]
    if not norms:
        return
    has_activation = any(_is_activation(module.get_submodule(name)) for name in names)
    graphs = [_traced(module, training) for training in (False, True)]
    for name in norms:
        if any(graph is None for graph in graphs):
            if has_activation:
                reason = f"the forward of {type_name(module)} cannot be traced"
                yield _Pair(name, "", f"{reason}, to see what follows it")
            continue
        found = {_follower(module, graph, name) for graph in graphs if graph is not None}
        if len(found) == 1 and (pair := found.pop()) is not None:
            yield pair


def _own_names(module: nn.Module) -> list[str]:
    """Children; in a traced graph, which calls modules of any depth, all of them."""
    if isinstance(module, fx.GraphModule):
        return [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    return [name for name, child in module._modules.items() if child is not None]


def _traced(module: nn.Module, training: bool) -> fx.Graph | None:
    """The graph of the module's own forward in a mode, or None if it cannot be traced."""
    if isinstance(module, fx.GraphModule):
        return module.graph
    state = dict(vars(module))
    module.training = training
    try:
        return _OwnForward().trace(module)
    except Exception:  # fx raises many types
        return None
    finally:
        # A forward may have set attributes to what stands for values in the trace.
        vars(module).clear()
        vars(module).update(state)


def _follower(module: nn.Module, graph: fx.Graph, norm: str) -> _Pair | None:
    """The activation that alone reads the norm's result; None if something else does."""
    calls = _calls(module, graph, norm)
    if len(calls) != 1:
        return None
    node = calls[0]
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_module":
            return _pair_of_call(norm, user)
        child = module.get_submodule(str(user.target))
        if user.args != (node,) or user.kwargs:
            return None
        if _is_activation(child):
            uses = len(_calls(module, graph, str(user.target)))
            reason = f"its activation {user.target} serves {uses} places" if uses > 1 else None
            return _Pair(norm, str(user.target), reason)
        if type(child) is not nn.Identity:
            return None
        node = user
    return None


def _pair_of_call(norm: str, user: fx.Node) -> _Pair | None:
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    if name not in CALLS:
        return None
    return _Pair(norm, "", f"its activation is the call {name} in its parent's forward, no module")


def _calls(module: nn.Module, graph: fx.Graph, name: str) -> list[fx.Node]:
    """The calls of a child, under whatever names it has."""
    child = module.get_submodule(name)
    return [
        node
        for node in graph.nodes
        if node.op == "call_module" and module.get_submodule(str(node.target)) is child
    ]
