"""Argument checks that several ops share.

Every message names the argument, says what it was and what it must be.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """``value`` is one of the choices."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {expected}, but is {value!r}")
