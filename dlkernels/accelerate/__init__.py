"""Swaps fused modules into a model that exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import nn

from dlkernels.accelerate import (
    asff,
    atss,
    batch_norm_act,
    conv3x3,
    dense_block,
    mbconv,
    residual_block,
    squeeze_excite,
)
from dlkernels.accelerate.match import Match, follow_mode, type_name
from dlkernels.accelerate.verify import Comparison, Verification, VerificationError
from dlkernels.checks import check_choice
from dlkernels.dense_block.op import MEMORY

__all__ = ["Comparison", "Report", "VerificationError", "accelerate"]

FSDP = (
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    "torch.distributed.fsdp.FSDPModule",
)
COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
ITSELF = "(the model itself)"


@dataclass
class Report:
    """What :func:`accelerate` did.

    Attributes:
        model: the model, changed in place.
        swapped: for each swapped module (or assigner) its name and the original.
        left: for each module that was left its name and the reason.
        comparisons: how exact the model is before and after, if an example was given.
    """

    model: nn.Module = field(repr=False)
    swapped: dict[str, Any] = field(default_factory=dict, repr=False)
    left: dict[str, str] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list, repr=False)

    def restore(self) -> nn.Module:
        """Puts the original modules back, in the model's mode, and returns the model."""
        for name, original in self.swapped.items():
            follow_mode(original, _get(self.model, name))
            _set(self.model, name, original)
        self.swapped.clear()
        return self.model

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} modules swapped, {len(self.left)} left"]
        lines += [f"  swapped {name}: {type_name(old)}" for name, old in self.swapped.items()]
        lines += [f"  left {name}: {reason}" for name, reason in self.left.items()]
        if self.comparisons:
            worst = max(self.comparisons, key=lambda c: c.after / c.limit)
            lines.append(
                f"verified: {len(self.comparisons)} comparisons within their limits, the nearest "
                f"{worst.name} with a relative error of {worst.after:.1e} of {worst.limit:.1e}"
            )
        return "\n".join(lines)


def accelerate(
    model: nn.Module, example_input: Any = None, verify: bool = True, memory: str = "balanced"
) -> Report:
    """Replaces parts of a model by fused ones, in place.

    These are, of torchvision and timm and by their exact types: squeeze-excite modules, dense
    blocks and transitions, the inverted residual blocks of EfficientNet, MobileNetV2, MobileNetV3
    and MNASNet, the residual blocks of ResNet, ResNeXt, RegNet and SENet, and batch norms with an
    activation inside. Of any model: an ``nn.BatchNorm2d`` and
    the activation module that follows it, in a sequence or, as a trace of their parent's forward
    shows, alone; and float32 3x3 convolutions of stride 1 on the CPU, of 32 channels or more. By
    their attributes, and after a copy with random parameters was shown to compute the formula in
    float64: the classic SELayer, hand-written dense blocks, the published ASFF, and mmdetection's
    ATSSAssigner.

    The new modules hold the very layers, and so the Parameter objects and state-dict keys, of the
    old ones: an optimizer that exists stays valid. What can't be proven equal is left, as are
    modules with hooks or parametrizations. A compiled, scripted or FSDP model is left as a whole:
    accelerate it first, then compile or shard. In DistributedDataParallel, modules are swapped.

    The proof is of each module's forward. Code that calls the norm of a pair by itself, such as
    an extractor of features between a norm and its activation, gets activated maps. To synchronise
    batch norms afterwards, use :func:`dlkernels.nn.convert_sync_batchnorm`: torch's own conversion
    would drop the activations inside them, and raises.

    Args:
        model: any module.
        example_input: the model's input: a tensor, a tuple of arguments or a dict of keyword
            arguments; None if there is none to verify with.
        verify: whether outputs, gradients and running statistics on ``example_input`` are compared
            with those before, in evaluation and with batch statistics, both against a copy in
            float64. State and random numbers stay as they are.
        memory: ``"balanced"`` or ``"minimal"``, of dense blocks, see
            :func:`dlkernels.ops.dense_block`; those whose layers checkpoint get ``"minimal"``.

    Returns:
        The report, whose ``restore()`` undoes the swaps.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: an unknown ``memory``.
        RuntimeError: the model does not run on ``example_input``.
        VerificationError: the swapped model is less exact than the contract allows; the model has
            its original modules again.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    check_choice("memory", memory, MEMORY)
    verification = None
    if verify and example_input is not None and _reason_against_all(model) is None:
        verification = Verification(model, example_input)
    report = _swap(model, memory)
    if verification is not None:
        try:
            report.comparisons = verification.compare()
        except VerificationError as error:
            report.restore()
            raise VerificationError(
                f"the model was restored, since after the swaps {error}; swap its parts one by one "
                "to find the cause, or pass verify=False"
            ) from error
    return report


def _swap(model: nn.Module, memory: str) -> Report:
    report = Report(model)
    fused: dict[tuple[int, ...], tuple[Any, ...]] = {}
    done: list[str] = []  # prefixes of what is swapped or left with all that it holds
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if any(name == prefix or name.startswith(f"{prefix}.") or not prefix for prefix in done):
            continue
        reason = _reason_against_all(module)
        if reason is not None:
            report.left[name or ITSELF] = reason
            done.append(name)
            continue
        for match in list(_matches(module, memory)):
            names = [".".join(filter(None, (name, part))) for part in match.names]
            reason = match.reason
            if names == [""]:
                reason = reason or f"it is the model itself; use {match.drop_in} in its place"
            if reason is not None:
                report.left[names[0] or ITSELF] = reason
                continue
            originals = [_get(model, full) for full in names]
            # A module that the model uses in two places stays one module.
            key = tuple(id(original) for original in originals)
            if key not in fused:
                fused[key] = match.fuse()
            for full, original, new in zip(names, originals, fused[key], strict=True):
                report.swapped[full] = original
                _set(model, full, new)
            done += names
            if match.names == ("",):
                break  # what other searches find is inside
    return report


def _matches(module: nn.Module, memory: str) -> Iterator[Match]:
    yield from squeeze_excite.matches(module)
    yield from dense_block.matches(module, memory)
    yield from mbconv.matches(module)
    yield from residual_block.matches(module)
    yield from batch_norm_act.matches(module)
    yield from asff.matches(module)
    yield from atss.matches(module)
    yield from conv3x3.matches(module)


def _reason_against_all(module: nn.Module) -> str | None:
    """Why nothing in the module may be swapped, or None."""
    types = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript; accelerate it first, then script or trace"
    if COMPILED in types or module._compiled_call_impl is not None:
        return "it was compiled; accelerate it first, then compile"
    if not types.isdisjoint(FSDP):
        return "its parameters are sharded by FSDP; accelerate it first, then shard"
    return None


def _get(model: nn.Module, name: str) -> Any:
    return reduce(getattr, name.split("."), model) if name else model


def _set(model: nn.Module, name: str, value: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(_get(model, parent), child, value)
