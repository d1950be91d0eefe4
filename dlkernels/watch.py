"""The numeric watch: ``DLKERNELS_CHECK=1`` runs the reference formulas beside every op.

For users who suspect a kernel. Outputs, tensors updated in place and gradients are compared with
the formula in float64, and an op raises where its relative error (norm of the difference over norm)
exceeds both the contract and four times the error of the same formula in the op's own dtype: twice
for the contract, and again for chance, as both errors are random (100 times where the formula has
no correct digit, as in a gradient that cancels to zero). Unset, the variable costs nothing: the
functions are left as they are. Compiled, exported and traced calls are not watched, and a watched
op waits for its device.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook
from torch.utils import _pytree as pytree

from dlkernels import backend
from dlkernels.checks import describe

IS_ON = os.environ.get("DLKERNELS_CHECK") == "1"

# Relative errors; those of wider dtypes grow with the square root of the reduction's length.
NARROW = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
WIDE = 1e-6

# The reference is chosen for the whole process: other threads wait.
_LOCK = threading.RLock()

Function = TypeVar("Function", bound=Callable[..., Any])


def watched(function: Function) -> Function:
    """Decorates public functions that have kernels: watched if ``DLKERNELS_CHECK=1`` is set."""
    return watch(function) if IS_ON else function


def watch(function: Function) -> Function:
    """The function with its reference beside it.

    It raises RuntimeError, in forward or in backward, with the function's name, what differs, the
    relative error and its limit, and the shapes and dtypes of all tensors.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _is_traced():
            return function(*args, **kwargs)
        with _LOCK:
            return _call(function, dict(signature.bind(*args, **kwargs).arguments))

    return wrapper  # type: ignore[return-value]


def _is_traced() -> bool:
    compiler = torch.compiler
    return compiler.is_compiling() or compiler.is_exporting() or torch.jit.is_tracing()


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    paths, structure = pytree.tree_flatten_with_path(arguments)
    names = [pytree.keystr(path).replace("['", "", 1).replace("']", "", 1) for path, _ in paths]
    given = [leaf for _, leaf in paths]

    def run(leaves: list[Any]) -> Any:
        return function(**pytree.tree_unflatten(leaves, structure))

    comparison = _Comparison(function.__name__, names, given)
    exact_inputs, own_inputs = (_copies(given, dtype) for dtype in (torch.float64, None))
    # Views, whose gradients come from this call alone.
    inputs = [leaf.view_as(leaf) if _has_gradient(leaf) else leaf for leaf in given]
    # All runs draw the same random numbers; the last moves the generators on.
    with torch.random.fork_rng():
        result = run(inputs)
    with backend.use_backend("reference"):
        with torch.random.fork_rng():
            own = pytree.tree_leaves(run(own_inputs))
        exact = pytree.tree_leaves(run(exact_inputs))

    outputs, _ = pytree.tree_flatten_with_path(result)
    labels = [f"output{pytree.keystr(path)}" for path, _ in outputs]
    outputs = [leaf for _, leaf in outputs]
    # A mean of normalised values cancels; float32 sums know it to the inputs' rounding at best.
    floor = torch.finfo(torch.float32).eps * _largest_rms(exact_inputs)
    comparison.check(labels, outputs, exact, own, floor)
    afterwards = [f"{name} afterwards" for name in names]
    comparison.check(afterwards, given, exact_inputs, own_inputs, floor)
    comparison.watch_backward((inputs, outputs), (exact_inputs, exact), (own_inputs, own))
    return result


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad and torch.is_grad_enabled()


def _copies(leaves: list[Any], dtype: torch.dtype | None) -> list[Any]:
    """Leaves of a graph of their own; floating-point tensors in the dtype, if it is given."""

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        changed = dtype if leaf.is_floating_point() else None
        return leaf.detach().to(changed or leaf.dtype, copy=True).requires_grad_(leaf.requires_grad)

    return [copy(leaf) for leaf in leaves]


Graph = tuple[list[Any], list[Any]]  # inputs and outputs of a run


class _Comparison:
    """Of one call with its references."""

    def __init__(self, function: str, names: list[str], given: list[Any]):
        self.function = function
        self.names = names
        tensors = {n: leaf for n, leaf in zip(names, given, strict=True) if _is_tensor(leaf)}
        self.call = ", ".join(f"{name} {describe(tensor)}" for name, tensor in tensors.items())
        self.contract = _contract(list(tensors.values()))

    def check(
        self,
        labels: Sequence[str],
        actual: list[Any],
        exact: list[Any],
        own: list[Any],
        floor: float = 0.0,
    ) -> None:
        """All tensors of ``actual`` for which there is an expected one are within the limit.

        ``floor`` is an error per value that always passes.
        """
        for label, *values in zip(labels, actual, exact, own, strict=True):
            if all(map(_is_tensor, values)):
                self._check(label, floor, *values)

    @torch.no_grad()
    def _check(self, label: str, floor: float, actual: Tensor, exact: Tensor, own: Tensor) -> None:
        if actual.shape != exact.shape:
            self._fail(label, f"shape {list(actual.shape)}, expected {list(exact.shape)}")
        elif not actual.is_floating_point():
            different = int((actual != exact).sum())
            if different > 0:
                self._fail(label, f"{different} of {actual.numel()} values are not equal")
        else:
            error = relative_error(actual, exact)
            own_error = relative_error(own, exact)
            # What cancels to nothing is noise in both runs: only its magnitude can be compared.
            limit = max(self.contract, (4 if own_error < 1 else 100) * own_error)
            limit = max(limit, floor * actual.numel() ** 0.5 / norm_of(exact))
            if not error <= limit:
                self._fail(label, f"relative error {error:.2e}, limit {limit:.2e}")

    def _fail(self, label: str, what: str) -> None:
        raise RuntimeError(
            f"DLKERNELS_CHECK: {self.function}: {label} differs from the reference formula: "
            f"{what}; called with {self.call}"
        )

    def watch_backward(self, graph: Graph, exact: Graph, own: Graph) -> None:
        """Compares the gradients of the inputs whenever they have been computed."""
        inputs, outputs = graph
        places = [place for place, leaf in enumerate(inputs) if _has_gradient(leaf)]
        results = [place for place, leaf in enumerate(outputs) if _has_gradient(leaf)]
        if not places or not results:
            return
        labels = [f"gradient of {self.names[place]}" for place in places]
        received: dict[int, Tensor] = {}

        def check(grads: Sequence[Tensor | None]) -> None:
            exact_grads, own_grads = (_gradients(run, places, received) for run in (exact, own))
            self.check(labels, list(grads), exact_grads, own_grads)
            received.clear()

        def receive(place: int, grad: Tensor | None) -> None:
            if grad is not None:
                received[place] = grad

        for place in results:
            outputs[place].register_hook(functools.partial(receive, place))
        register_multi_grad_hook([inputs[place] for place in places], check)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _contract(tensors: list[Tensor]) -> float:
    """The greatest relative error; no reduction is longer than the largest tensor."""
    longest = max((tensor.numel() for tensor in tensors), default=1)
    limits = [WIDE * math.sqrt(max(1, longest))]
    limits += [NARROW.get(tensor.dtype, 0.0) for tensor in tensors]
    for device in {tensor.device.type for tensor in tensors}:
        if torch.is_autocast_enabled(device):
            # Inputs are rounded as well as results.
            limits.append(2 * NARROW.get(torch.get_autocast_dtype(device), 0.0))
    return max(limits)


def _gradients(run: Graph, places: list[int], received: dict[int, Tensor]) -> list[Any]:
    """Those of a reference's inputs for the gradients that the op's outputs received."""
    inputs, outputs = run
    return list(
        torch.autograd.grad(
            [outputs[place] for place in received],
            [inputs[place] for place in places],
            [grad.to(outputs[place].dtype) for place, grad in received.items()],
            retain_graph=True,
            allow_unused=True,
        )
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm; NaN and infinity in the same places are equal."""
    expected = expected.double()
    # What overflows the narrow dtype must be infinite there too.
    rounded, value = expected.to(actual.dtype).double(), actual.double()
    equal = (value == rounded) | (value.isnan() & rounded.isnan())
    difference = torch.where(equal, 0.0, value - expected).norm()
    return float(difference) / norm_of(expected)


def norm_of(tensor: Tensor) -> float:
    """Of the finite values, above 0."""
    return max(1e-30, float(tensor.double().nan_to_num(0.0, 0.0, 0.0).norm()))


def _largest_rms(leaves: list[Any]) -> float:
    tensors = [leaf.detach() for leaf in leaves if _is_tensor(leaf) and leaf.is_floating_point()]
    return max((norm_of(t) / max(1, t.numel()) ** 0.5 for t in tensors), default=0.0)
