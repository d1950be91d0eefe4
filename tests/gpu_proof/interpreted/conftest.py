"""Triton's interpreter, mended: its matrix product, and the time of calls inside kernels.

It multiplies the bit patterns of bfloat16, and float32 exactly whatever the precision asked for;
tensor cores do not.
"""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import triton.language as tl
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


def _tf32(x: np.ndarray) -> np.ndarray:
    """To 10 bits after the point, halves away from zero."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def _product_of_three(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of float32 values, each as the sum of two TF32 values; the least product is left out."""
    with np.errstate(invalid="ignore"):
        large = _tf32(a), _tf32(b)
        small = _tf32(a - large[0]), _tf32(b - large[1])
        corrections = np.matmul(small[0], large[1]) + np.matmul(large[0], small[1])
        # Infinities have no digits left.
        return np.where(np.isnan(corrections), 0, corrections) + np.matmul(*large)


def _dot(_builder, a, b, accumulator, input_precision, _max_imprecise):
    values = [
        (x.data.astype(np.uint32) << 16).view(np.float32)
        if x.dtype.scalar == tl.bfloat16
        else x.data
        for x in (a, b)
    ]
    if a.dtype.scalar == tl.float32:
        assert input_precision == INPUT_PRECISION.TF32x3, "float32 must keep its digits"
        product = _product_of_three(*values)
    else:
        product = np.matmul(*values, dtype=np.float32)
    return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


@pytest.fixture(autouse=True)
def tensor_cores():
    with mock.patch.object(InterpreterBuilder, "create_dot", _dot):
        yield


def _call(function, *args, **kwargs):
    """Calls a function inside a kernel, whose launch has remapped the language."""
    return function.rewrite()(*args, **kwargs)


@pytest.fixture(autouse=True)
def quick_calls():
    """Remaps the language once a launch; the interpreter does so at every call, in milliseconds."""
    remap = interpreter._patch_lang
    whole = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def remap_all(_function):
        return remap(whole)

    with (
        mock.patch.object(InterpretedFunction, "__call__", _call),
        mock.patch.object(interpreter, "_patch_lang", remap_all),
    ):
        yield
