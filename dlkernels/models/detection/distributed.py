"""Losses of several processes that equal those of one."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def shared_normaliser(value: Tensor) -> Tensor:
    """What a process divides a sum of losses by: the mean of ``value`` over all processes.

    DistributedDataParallel averages gradients over processes. A process that divides its own sum
    by this mean thus contributes what it would to one process that had the whole batch and divided
    by the whole ``value``. That is at least 1, so that a batch without objects divides by no zero.

    Args:
        value: a count or a sum of weights in this process, a scalar; it gets no gradient.
    """
    total = value.detach().clone()
    processes = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        processes = dist.get_world_size()
    return total.clamp(min=1) / processes
