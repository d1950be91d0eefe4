"""Argument checks that several ops share.

Every message names the argument, says what it was and what it must be.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any

import torch

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(tensor: torch.Tensor) -> str:
    """Shape, dtype and device in the form in which messages quote a tensor."""
    return f"{list(tensor.shape)} ({str(tensor.dtype).removeprefix('torch.')}, {tensor.device})"


def check_tensor(name: str, value: Any) -> None:
    """``value`` is a tensor of a floating-point dtype of the contract.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, but is {type(value).__name__}")
    if value.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, but is {value.dtype}"
        )
    check_dense(name, value)


def check_dense(name: str, value: torch.Tensor) -> None:
    """``value`` has strides: it is not sparse, for example.

    Raises:
        TypeError: it has none.
    """
    # A layout may not be read in a backward pass that is compiled, where none is sparse.
    if not torch.compiler.is_compiling() and value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, but is {value.layout}")


def check_maps(name: str, value: Any) -> None:
    """``value`` is a floating-point tensor of shape [N, C, H, W]."""
    check_tensor(name, value)
    if value.dim() != 4:
        raise ValueError(f"{name} must have shape [N, C, H, W], but is {describe(value)}")


def check_shape(name: str, value: torch.Tensor, shape: Sequence[int], meaning: str) -> None:
    """``value`` has the shape, which ``meaning`` explains, such as ``"[C] of x"``."""
    if list(value.shape) != list(shape):
        raise ValueError(
            f"{name} must have shape {list(shape)} ({meaning}), but is {describe(value)}"
        )


def check_like(name: str, value: Any, other_name: str, other: torch.Tensor) -> None:
    """``value`` is a tensor of the device and, outside autocast, of the dtype of ``other``."""
    check_tensor(name, value)
    check_device(name, value, other_name, other)
    if value.dtype != other.dtype and not torch.is_autocast_enabled(other.device.type):
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}, but is {value.dtype}"
        )


def check_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """``value`` is on the device of ``other``."""
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, "
            f"but is on {value.device}"
        )


def check_parameter(name: str, value: Any, x: torch.Tensor) -> None:
    """``value`` is a tensor of float32 or the dtype of ``x``, on its device.

    Raises:
        TypeError: it is no tensor, or of another dtype.
        ValueError: it is on another device.
    """
    check_tensor(name, value)
    if value.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{name} must be float32 or have the dtype of x, {x.dtype}, but is {value.dtype}"
        )
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, but is {value.device}")


def check_constant(name: str, value: torch.Tensor) -> None:
    """``value`` requires no gradient, which it would not get."""
    if not torch.compiler.is_compiling() and value.requires_grad:
        raise ValueError(f"{name} gets no gradient and must not require one; detach it")


def check_number(name: str, value: Any) -> None:
    """``value`` is a real number, which may be NaN.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, Real)):
        raise TypeError(f"{name} must be a number, but is {type(value).__name__}")


def check_integer(name: str, value: Any) -> None:
    """``value`` is an integer, and not a flag.

    Raises:
        TypeError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise TypeError(f"{name} must be an integer, but is {type(value).__name__}")


def check_flag(name: str, value: Any) -> None:
    """``value`` is True or False.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{name} must be True or False, but is {value!r}")


def check_sequence(name: str, value: Any, meaning: str) -> None:
    """``value`` is a list or tuple; ``meaning`` says of what.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{name} must be a list or tuple of {meaning}, but is {type(value).__name__}"
        )


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """``value`` is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {expected}, but is {value!r}")
