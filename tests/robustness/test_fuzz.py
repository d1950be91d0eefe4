"""Any arguments of any op: the right answer, or an error that names an argument.

``make fuzz`` runs 10,000 random cases; DLKERNELS_FUZZ sets their number for all ops together.
"""

import os
import re
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.utils import _pytree as pytree

from dlkernels import ops, use_backend
from dlkernels.watch import NARROW, watch
from tests.robustness.fuzzing import ARGUMENTS, Call, changed_calls, valid_calls

CASES = int(os.environ.get("DLKERNELS_FUZZ", "0"))
PER_TEST = -(-CASES // (2 * len(ARGUMENTS))) if CASES else 12
fuzzed = settings(
    max_examples=PER_TEST,
    deadline=None,
    database=None,
    derandomize=not CASES,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def differentiable(result: object) -> list[Tensor]:
    return [
        leaf
        for leaf in pytree.tree_leaves(result)
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]


def error_of(call: Call) -> Exception | None:
    """What forward and backward raise."""
    try:
        for out in differentiable(call()):
            out.sum().backward(retain_graph=True)
    except Exception as error:
        return error
    return None


def check_right(call: Call) -> None:
    """Outputs, running statistics and gradients are those of the formula in float64."""
    leaves = pytree.tree_leaves(call.arguments)
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves):
        return
    # In narrow dtypes it is rounding that decides on which side of a kink a derivative is taken.
    narrow = any(isinstance(leaf, Tensor) and leaf.dtype in NARROW for leaf in leaves)
    outputs = differentiable(watched(call, attempts=3 if narrow else 1))
    if outputs and not narrow:
        check_gradients(outputs)


def watched(call: Call, attempts: int) -> object:
    """The result, which is right for one of some calls that differ by rounding.

    The variance of two values that are nearly the same has no digit in a narrow dtype that is more
    than luck, in the formula as in the kernel; a kernel that is wrong is wrong for all.
    """
    try:
        return watch(getattr(ops, call.name))(**call.arguments)
    except RuntimeError as error:
        if attempts == 1 or "DLKERNELS_CHECK" not in str(error) or "relative" not in str(error):
            raise
        return watched(Call(call.name, pytree.tree_map(rounded, call.arguments)), attempts - 1)


def rounded(value: object) -> object:
    """A tensor of a narrow dtype with each value changed by about a rounding."""
    if not isinstance(value, Tensor) or value.dtype not in NARROW:
        return value
    noise = torch.finfo(value.dtype).eps * torch.randn(value.shape)
    changed = (value.detach().float() * (1 + noise)).to(value.dtype)
    return torch.empty_like(value).copy_(changed).requires_grad_(value.requires_grad)


def check_gradients(outputs: list[Tensor]) -> None:
    """Watched gradients are right for one of three random gradients of the outputs.

    A sum that cancels by chance has no correct digit to compare, but not three times; a kernel that
    is wrong is wrong for all.
    """
    for attempts_left in (2, 1, 0):
        grads = [torch.randn_like(out) for out in outputs]
        try:
            torch.autograd.backward(outputs, grads, retain_graph=True)
        except RuntimeError as error:
            if attempts_left and "DLKERNELS_CHECK" in str(error) and "relative error" in str(error):
                continue
            raise
        return


def check_clear(error: Exception, call: Call) -> None:
    assert type(error) in (TypeError, ValueError), f"{call}: {error!r}"
    names = "|".join(call.arguments)
    assert re.search(rf"\b({names})\b.* (must|but|gets) ", str(error)), f"{call}: {error!r}"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_valid_arguments(name):
    @fuzzed
    @given(valid_calls(name))
    def run(call):
        error = error_of(call)
        if error is not None:
            raise AssertionError(call) from error
        check_right(call)

    run()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_one_changed_argument(name):
    @fuzzed
    @given(changed_calls(name))
    def run(call):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = error_of(call)
            with use_backend("reference"):
                expected = error_of(call)
        if error is None and expected is None:
            check_right(call)
        else:
            assert (type(error), str(error)) == (type(expected), str(expected)), call
            check_clear(error, call)

    run()
