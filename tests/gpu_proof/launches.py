"""Records what a Triton launcher launches, without a GPU and without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass
class Launch:
    """One launch as the run-time would compile it.

    Attributes:
        kernel: the function.
        signature: for each argument its type, ``"constexpr"`` for compile-time values; for a tuple
            of tensors, those of its items.
        constants: the compile-time values.
        divisible: positions of the arguments that 16 divides; items of a tuple follow its own.
        options: warps, stages and registers at most, where the launcher names them.
    """

    kernel: JITFunction
    signature: dict[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    divisible: list[tuple[int, ...]]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.__name__


def record(launcher: Callable[..., object], *args: object) -> list[Launch]:
    """The launches of ``launcher(*args)``; outputs stay unwritten."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_launch_of(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        launcher(*args)
    return launches


def _launch_of(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    launch = Launch(kernel, {}, {}, [], options)
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        # The run-time turns None and the integer 1 into constants, too.
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            launch.signature[parameter.name] = "constexpr"
            launch.constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            launch.signature[parameter.name] = TYPES[value.dtype]
            launch.divisible.append((position,))
        elif isinstance(value, tuple):
            launch.signature[parameter.name] = tuple(TYPES[item.dtype] for item in value)
            launch.divisible += [(position, index) for index in range(len(value))]
        elif isinstance(value, float):
            launch.signature[parameter.name] = "fp32"
        else:
            launch.signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                launch.divisible.append((position,))
    return launch
