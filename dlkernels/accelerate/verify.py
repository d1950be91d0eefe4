"""Compares a model before and after its modules were swapped, on an example."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree

from dlkernels.accelerate.match import type_name

WRAPPERS = (
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.nn.parallel.data_parallel.DataParallel",
)
# A swapped model may be so many times less exact than the model was; its smallest parts, whose
# errors scatter more, so many times.
FACTOR, FACTOR_OF_PARTS = 2.0, 10.0
# How often both models run, at most, until every error is within its limit.
RUNS = 6


@dataclass(frozen=True)
class Comparison:
    """How exact a model is before and after its modules were swapped.

    Errors are norm of the difference over norm, against a copy of the original in float64.

    Attributes:
        name: what is compared: an output, a gradient, a buffer.
        before: the error of the original model in its own dtype, the largest of all runs.
        after: the error of the swapped model, the least of all runs.
        limit: what ``after`` may be: twice ``before`` (ten times for one of many gradients), plus
            the contract of a single op.
    """

    name: str
    before: float
    after: float
    limit: float

    @property
    def share(self) -> float:
        """``after`` over ``limit``; infinite if one of them is no number."""
        share = self.after / self.limit
        return math.inf if math.isnan(share) else share


class VerificationError(RuntimeError):
    """The swapped model is less exact than the contract allows."""


class Verification:
    """Measures a model before its modules are swapped, to compare it with itself afterwards.

    In evaluation and then with batch statistics (dropout and stochastic depth stay off, since they
    draw random numbers), outputs and gradients of a random projection of them are computed, and
    the running statistics after it. Buffers, gradients, modes, parameters and the state of random
    numbers are as before afterwards.

    A value that lies nearer to the kink of a ReLU than float32 can tell has a gradient or none by
    chance, in the original as in the swapped model. So there is a third mode, with batch statistics
    and with weights and biases in the batch norms that keep what they give away from kinks: there,
    float32 alone decides what is exact. And where one run of each leaves an error beyond its limit,
    both models run again, on copies of the example that differ by its dtype's rounding: a chance
    falls out otherwise in one of the runs, a wrong result is wrong in all.

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
            self.original = copy.deepcopy(self.model)
            exact = copy.deepcopy(self.model).double()
            smooth = _is_float32(example)
            self.exact = _results(exact, _pytree.tree_map(_double, example), smooth)
            del exact
            results = _results(self.original, example, smooth)
        except Exception as error:
            raise RuntimeError(
                "the model cannot be verified: it, or its copy in float64, does not run on "
                f"example_input ({type(error).__name__}: {error}); pass verify=False to do without"
            ) from error
        self.smooth = smooth
        self.tolerance = _tolerance(results, example)
        self.before = [self._errors(results)]

    def compare(self, strict: bool = True) -> list[Comparison]:
        """All comparisons of the model with what it was.

        Args:
            strict: whether a comparison beyond its limit is an error.

        Raises:
            VerificationError: one is beyond its limit, or the model does not run any more.
        """
        after = [self._errors(self._results_after(self.example))]
        comparisons = self._comparisons(after)
        while len(after) < RUNS and any(c.share > 1 for c in comparisons):
            example = _rounding_of(self.example, len(after))
            self.before.append(self._errors(_results(self.original, example, self.smooth)))
            after.append(self._errors(self._results_after(example)))
            comparisons = self._comparisons(after)
        worst = max(comparisons, key=lambda c: c.share)
        if strict and worst.share > 1:
            raise VerificationError(
                f"{worst.name} has a relative error of {worst.after:.1e} against float64, where "
                f"the original has {worst.before:.1e} and {worst.limit:.1e} is allowed"
            )
        return comparisons

    def _results_after(self, example: Any) -> dict[str, Tensor]:
        try:
            return _results(self.model, example, self.smooth)
        except Exception as error:
            raise VerificationError(f"it does not run: {error}") from error

    def _comparisons(self, after: Sequence[Mapping[str, float]]) -> list[Comparison]:
        comparisons = []
        for name in self.before[0]:
            group, _, part = name.partition(" of ")
            before = _largest(errors[name] for errors in self.before)
            limit = FACTOR * before + self.tolerance
            if part:
                total = _largest(errors[group] for errors in self.before)
                limit = FACTOR_OF_PARTS * max(before, total) + self.tolerance
            least = min(math.inf if math.isnan(e[name]) else e[name] for e in after)
            comparisons.append(Comparison(name, before, least, limit))
        return comparisons

    def _errors(self, results: Mapping[str, Tensor]) -> dict[str, float]:
        """The relative error of each group of results, and of each of its parts."""
        if self.exact.keys() != results.keys():
            differing = sorted(self.exact.keys() ^ results.keys())
            raise VerificationError(f"it has other results: {differing[0]}")
        errors = {}
        for group in dict.fromkeys(name.partition(" of ")[0] for name in self.exact):
            names = [name for name in self.exact if name.partition(" of ")[0] == group]
            total = _norm(self.exact[name] for name in names)
            differences = {name: self._difference(name, results[name]) for name in names}
            errors[group] = math.hypot(*differences.values()) / max(total, 1e-30)
            for name in names if len(names) > 1 else ():
                # Gradients that are zero but for rounding have no relative error.
                own = max(float(self.exact[name].norm()), 1e-3 * total, 1e-30)
                errors[name] = differences[name] / own
        return errors

    def _difference(self, name: str, result: Tensor) -> float:
        exact = self.exact[name]
        if result.shape != exact.shape:
            shapes = f"{list(result.shape)}, not {list(exact.shape)}"
            raise VerificationError(f"{name} has the shape {shapes}")
        return float((result.double() - exact).norm())


def _largest(errors: Iterable[float]) -> float:
    """The largest; no number if one of them is none."""
    values = list(errors)
    return math.nan if any(map(math.isnan, values)) else max(values)


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
    return value.double() if _is_floating(value) else value


def _is_float32(example: Any) -> bool:
    leaves = _pytree.tree_leaves(example)
    return all(leaf.dtype is torch.float32 for leaf in leaves if _is_floating(leaf))


def _results(model: nn.Module, example: Any, smooth: bool) -> dict[str, Tensor]:
    """Outputs and gradients in all modes, and buffers after those that change them.

    Args:
        model: as it is afterwards, too.
        example: its input.
        smooth: whether the mode away from kinks is one of them.
    """
    results: dict[str, Tensor] = {}
    for mode in ("evaluation", "training", "training away from kinks")[: 3 if smooth else 2]:
        with _state_kept(model):
            for module in model.modules():
                module.training = mode != "evaluation" and isinstance(module, _BatchNorm)
            if mode == "training away from kinks":
                _keep_away_from_kinks(model)
            results |= {f"{mode}: {key}": value for key, value in _step(model, example).items()}
            for name, buffer in model.named_buffers():
                if mode != "evaluation" and buffer.is_floating_point():
                    results[f"{mode}: buffers of {name}"] = buffer.clone()
    return results


def _keep_away_from_kinks(model: nn.Module) -> None:
    """Weights and biases of batch norms that give values around 1.5 with a deviation of 0.35.

    Hardly one is near 0, 3 or 6, where ReLU, ReLU6 and hardswish have their kinks. Parameters stay
    the same objects.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            channels = torch.linspace(0.35, 0.5, module.num_features, dtype=torch.float64)
            module.weight.data = channels.to(module.weight)
            if module.bias is not None:
                module.bias.data = torch.full_like(module.bias, 1.5)


def _step(model: nn.Module, example: Any) -> dict[str, Tensor]:
    parameters = {
        name: value for name, value in model.state_dict(keep_vars=True).items() if _learns(value)
    }
    with torch.enable_grad():
        leaves = _pytree.tree_leaves(_call(model, _pytree.tree_map(_detached, example)))
    outputs = [leaf for leaf in leaves if _is_floating(leaf)]
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


def _rounding_of(example: Any, seed: int) -> Any:
    """A copy of the example that differs from it by about a rounding of each value."""
    generator = torch.Generator().manual_seed(seed)

    def rounded(value: Any) -> Any:
        if not _is_floating(value):
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        eps = torch.finfo(value.dtype).eps
        return (value.double() * (1 + eps * noise)).to(value.dtype)

    return _pytree.tree_map(rounded, example)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


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
    """Buffers, modes, norms' parameters and the random numbers' state are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    norms = [module for module in modes if isinstance(module, _BatchNorm)]
    weights = [(weight, weight.data) for norm in norms for weight in norm.parameters(recurse=False)]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for weight, data in weights:
            weight.data = data
        for module, name, buffer, value in buffers:
            with torch.no_grad():
                module._buffers[name] = buffer.copy_(value)
