"""The formula of squeeze-and-excitation in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Function] = {"relu": F.relu, "silu": F.silu}
GATES: dict[str, Function] = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}
OUTPUT_ACTIVATIONS: dict[str, Function] = {"identity": lambda x: x, "relu": F.relu}


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    shortcut: Tensor | None,
    activation: str,
    gate: str,
    output_activation: str,
) -> Tensor:
    """See :func:`dlkernels.ops.squeeze_excite`; weights here are [R, C] and [C, R]."""
    pooled = x.mean((2, 3))
    hidden = ACTIVATIONS[activation](F.linear(pooled, reduce_weight, reduce_bias))
    scale = GATES[gate](F.linear(hidden, expand_weight, expand_bias))
    out = x * scale[:, :, None, None]
    if shortcut is not None:
        out = out + shortcut
    return OUTPUT_ACTIVATIONS[output_activation](out)
