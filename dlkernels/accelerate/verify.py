"""Compares a model before and after its modules were swapped, on an example."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from dlkernels.accelerate.match import type_name

WRAPPERS = (
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.nn.parallel.data_parallel.DataParallel",
)
# A swapped model may be so many times less exact than the model was; its smallest parts, whose
# errors scatter more, so many times.
FACTOR, FACTOR_OF_PARTS = 2.0, 10.0


@dataclass(frozen=True)
class Comparison:
    """How exact a model is before and after its modules were swapped.

    Errors are norm of the difference over norm, against a copy of the original in float64.

    Attributes:
        name: what is compared: an output, a gradient, a buffer.
        before: the error of the original model in its own dtype: the largest of that on the
            example and on copies of it that differ by its dtype's rounding, so that a model that
            amplifies rounding (a ReLU at its kink, a norm of two values) is known as one.
        after: the error of the swapped model.
        limit: what ``after`` may be: twice ``before`` (ten times for one of many gradients), plus
            the contract of a single op.
    """

    name: str
    before: float
    after: float
    limit: float


class VerificationError(RuntimeError):
    """The swapped model is less exact than the contract allows."""


class Verification:
    """Measures a model before its modules are swapped, to compare it with itself afterwards.

    In evaluation and then with batch statistics (dropout and stochastic depth stay off, since they
    draw random numbers), outputs and gradients of a random projection of them are computed, and
    the running statistics after it. Buffers, gradients, modes and the state of random numbers are
    as before afterwards.

    Args:
        model: in any mode.
        example: the model's input: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        RuntimeError: the model cannot be run on the example, or not in float64.
    """

    def __init__(self, model: nn.Module, example: Any):
        self.model = model.get_submodule("module") if type_name(model) in WRAPPERS else model
        self.example = example
        try:
            self.before = [_results(self.model, x) for x in _roundings_of(example)]
            exact = copy.deepcopy(self.model).double()
            self.exact = _results(exact, _pytree.tree_map(_double, example))
        except Exception as error:
            raise RuntimeError(
                "the model cannot be verified: it, or its copy in float64, does not run on "
                f"example_input ({type(error).__name__}: {error}); pass verify=False to do without"
            ) from error
        self.tolerance = _tolerance(self.before[0], example)

    def compare(self, strict: bool = True) -> list[Comparison]:
        """All comparisons of the model with what it was.

        Args:
            strict: whether a comparison beyond its limit is an error.

        Raises:
            VerificationError: one is beyond its limit, or the model does not run any more.
        """
        try:
            after = _results(self.model, self.example)
        except Exception as error:
            raise VerificationError(f"it does not run: {error}") from error
        comparisons = list(self._comparisons(after))
        worst = max(comparisons, key=lambda c: c.after / c.limit)
        if strict and not worst.after <= worst.limit:
            raise VerificationError(
                f"{worst.name} has a relative error of {worst.after:.1e} against float64, where "
                f"the original has {worst.before:.1e} and {worst.limit:.1e} is allowed"
            )
        return comparisons

    def _comparisons(self, after: Mapping[str, Tensor]) -> Iterator[Comparison]:
        if self.exact.keys() != after.keys():
            differing = sorted(self.exact.keys() ^ after.keys())
            raise VerificationError(f"it has other results: {differing[0]}")
        for group in dict.fromkeys(name.partition(" of ")[0] for name in self.exact):
            names = [name for name in self.exact if name.partition(" of ")[0] == group]
            total = _norm(self.exact[name] for name in names)
            runs = [self._errors(results, names, total) for results in self.before]
            before = max(error for error, _ in runs)
            parts_before = {name: max(parts[name] for _, parts in runs) for name in names}
            error, parts = self._errors(after, names, total)
            yield Comparison(group, before, error, FACTOR * before + self.tolerance)
            for name in names if len(names) > 1 else ():
                limit = FACTOR_OF_PARTS * (max(parts_before[name], before) + self.tolerance)
                yield Comparison(name, parts_before[name], parts[name], limit)

    def _errors(
        self, results: Mapping[str, Tensor], names: list[str], total: float
    ) -> tuple[float, dict[str, float]]:
        """The relative error of all names together, and of each."""
        norms, parts = [], {}
        for name in names:
            exact = self.exact[name]
            if results[name].shape != exact.shape:
                shapes = f"{list(results[name].shape)}, not {list(exact.shape)}"
                raise VerificationError(f"{name} has the shape {shapes}")
            norms.append((results[name].double() - exact).norm())
            # Gradients that are zero but for rounding have no relative error.
            parts[name] = float(norms[-1] / max(float(exact.norm()), 1e-3 * total, 1e-30))
        return _norm(norms) / max(total, 1e-30), parts


def _norm(tensors: Any) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _tolerance(results: Mapping[str, Tensor], example: Any) -> float:
    """The contract of a single op that sums over all pixels of the example."""
    dtype = next(value.dtype for value in results.values())
    if dtype in (torch.bfloat16, torch.float16):
        return {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    tensors = [leaf for leaf in _pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    sizes = (leaf.numel() // max(1, leaf.shape[1]) for leaf in tensors if leaf.dim() > 2)
    return 1e-6 * math.sqrt(max(sizes, default=1))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _results(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """Outputs and gradients in both modes, and buffers after the second."""
    results: dict[str, Tensor] = {}
    with _state_kept(model):
        for mode in ("evaluation", "training"):
            for module in model.modules():
                is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
                module.training = is_norm and mode == "training"
            results |= {f"{mode}: {key}": value for key, value in _step(model, example).items()}
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                results[f"training: buffers of {name}"] = buffer.clone()
    return results


def _step(model: nn.Module, example: Any) -> dict[str, Tensor]:
    parameters = {
        name: value for name, value in model.state_dict(keep_vars=True).items() if _learns(value)
    }
    with torch.enable_grad():
        leaves = _pytree.tree_leaves(_call(model, _pytree.tree_map(_detached, example)))
    outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    total = sum(_projected(output) for output in outputs if output.requires_grad)
    if parameters and isinstance(total, Tensor):
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        results |= {
            f"gradients of {name}": torch.zeros_like(value) if grad is None else grad
            for (name, value), grad in zip(parameters.items(), grads, strict=True)
        }
    return results


def _learns(value: object) -> bool:
    return isinstance(value, nn.Parameter) and value.requires_grad


def _roundings_of(example: Any) -> list[Any]:
    """The example, and copies that differ from it by about a rounding of each value."""
    generator = torch.Generator().manual_seed(0)

    def rounded(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        eps = torch.finfo(value.dtype).eps
        return (value.double() * (1 + eps * noise)).to(value.dtype)

    return [example, *(_pytree.tree_map(rounded, example) for _ in range(2))]


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _projected(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return (output * direction.to(output)).sum()


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Buffers, modes and the state of random numbers are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module, name, buffer, value in buffers:
            with torch.no_grad():
                module._buffers[name] = buffer.copy_(value)
