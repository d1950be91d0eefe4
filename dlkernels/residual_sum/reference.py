"""The formula of a residual block's end in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from dlkernels.batch_norm_act import reference as batch_norm_act
from dlkernels.batch_norm_act.reference import Norm
from dlkernels.excitation import Excitation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda x: x, "relu": F.relu}


def residual_sum(
    x: Tensor, shortcut: Tensor, norm: Norm, excitation: Excitation | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`dlkernels.ops.residual_sum`."""
    out, _, mean, var = batch_norm_act.batch_norm_act(
        x, *norm[:4], None, None, norm.eps, norm.activation, 0.0, False
    )
    if excitation is not None:
        gates = excitation.to(x.dtype).gates(out.mean((2, 3)))
        out = out * gates[:, :, None, None]
    return ACTIVATIONS[activation](out + shortcut), mean, var
