"""What the families' searches share: matches, known types, and reasons to leave a module alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# What a subclass may define without computing anything else.
HARMLESS = {"__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__constants__"}
HARMLESS |= {"__firstlineno__", "__static_attributes__", "__repr__", "extra_repr"}


@dataclass(frozen=True)
class Match:
    """A pattern found in a module.

    Attributes:
        names: the parts of the module that are to be replaced; ``""`` is the module itself.
        reason: why they must be left, or None.
        fuse: makes what replaces them, in the same order.
        drop_in: the public class that does the same, for a model that is nothing but this module.
    """

    names: tuple[str, ...]
    reason: str | None
    fuse: Callable[[], tuple[Any, ...]]
    drop_in: str


def whole(
    reasons: Iterable[str | None], fuse: Callable[[], nn.Module], drop_in: str
) -> Iterator[Match]:
    """The match of a module as a whole, left for the first of the reasons."""
    reason = next((reason for reason in reasons if reason is not None), None)
    yield Match(("",), reason, lambda: (fuse(),), drop_in)


def type_name(module: object) -> str:
    """The type's module and name."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def known_type(module: nn.Module, known: Collection[str]) -> str | None:
    """The known type that the module has, or inherits from, by its full name."""
    for cls in type(module).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in known:
            return name
    return None


def subclass_difference(module: nn.Module, kind: str) -> str | None:
    """Why the module may compute something else than the known type that it inherits from."""
    for cls in type(module).__mro__:
        if f"{cls.__module__}.{cls.__qualname__}" == kind:
            return None
        defined = sorted(set(vars(cls)) - HARMLESS)
        if defined:
            return f"it is a subclass of {kind} that defines {defined[0]}"
    return None


def shared_differences(module: nn.Module) -> Iterator[str]:
    """Reasons that hold for every module: what a fused one would not call or know."""
    for child in module.modules():
        if hasattr(child, "parametrizations"):
            yield "its parameters are parametrized"
        if any(getattr(child, hooks, None) for hooks in HOOKS):
            yield "it has hooks, which the fused module would not call"
        if "forward" in vars(child):
            yield "the forward method of an instance in it was replaced"
        if child._compiled_call_impl is not None:
            yield "it was compiled; accelerate it first, then compile"


def follow_mode(module: Any, other: Any) -> Any:
    """Gives ``module`` the mode of ``other``; layers that both hold keep theirs: frozen norms."""
    if not isinstance(module, nn.Module):
        return module
    shared = {id(child) for child in other.modules()}
    for child in module.modules():
        if id(child) not in shared:
            child.training = other.training
    return module


def choice_difference(name: str, module: nn.Module, known: Collection[str]) -> str | None:
    """Why the activation or gate is none of those that are understood."""
    if is_known_activation(module, known):
        return None
    return f"its {name} is {type_name(module)}, not one of {', '.join(known)}"


def is_known_activation(module: object, known: Collection[str]) -> bool:
    """Whether the module is torch's or timm's activation of a known name."""
    kind = type_name(module)
    return type(module).__name__ in known and kind.startswith(("torch.nn.", "timm.layers."))
