"""Batch norm whose statistics are those of all processes: ``nn.SyncBatchNorm`` for any device."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def is_synchronized(norm: nn.Module) -> bool:
    """Whether the norm takes its statistics from all processes, so that no fused op may run it."""
    return isinstance(norm, nn.SyncBatchNorm)


def apply_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm of maps [N, C, H, W], without the activation that a subclass may add.

    ``nn.SyncBatchNorm`` runs on every device here; torch's own refuses the CPU. In training, count,
    sum and squared deviations are all-reduced, and so are their gradients in backward: the result
    is that of one process with the joined batch, however unequal the processes' batches are.
    Saved for backward: what the plain formula saves, of the size of ``x``.

    Args:
        norm: ``nn.BatchNorm2d``, ``nn.SyncBatchNorm`` or a subclass.
        x: maps of a floating-point dtype; statistics are float32 (float64 for float64).

    Returns:
        Maps of the shape and dtype of ``x``.

    Raises:
        ValueError: the batch of all processes has one value per channel.
    """
    if not isinstance(norm, nn.SyncBatchNorm):
        assert isinstance(norm, nn.BatchNorm2d)
        return nn.BatchNorm2d.forward(norm, x)
    if not norm.training or not _several(norm.process_group):
        return _local(norm, x)
    return _synchronized(norm, x)


def _several(group: dist.ProcessGroup | None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _local(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    factor = _count_batch(norm)
    uses_batch = norm.training or norm.running_mean is None
    tracks = not norm.training or norm.track_running_stats
    running = (norm.running_mean, norm.running_var) if tracks else (None, None)
    return F.batch_norm(x, *running, norm.weight, norm.bias, uses_batch, factor, norm.eps)


def _count_batch(norm: nn.SyncBatchNorm) -> float:
    """Counts the batch in training; returns the weight of its statistics in the running ones."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return norm.momentum or 0.0


def _synchronized(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    from torch.distributed.nn.functional import all_reduce

    def total(local: Tensor) -> Tensor:
        return all_reduce(local, group=norm.process_group or dist.group.WORLD)

    values = x.to(torch.promote_types(x.dtype, torch.float32))
    count = values.new_tensor([values.numel() // max(1, values.shape[1])])
    joined = total(torch.cat([values.sum((0, 2, 3)), count]))
    count = joined[-1].detach()
    if count <= 1:
        raise ValueError("x must have more than one value per channel in all processes together")
    centred = values - (joined[:-1] / count)[:, None, None]
    var = total(centred.square().sum((0, 2, 3))) / count
    with torch.no_grad():
        factor = _count_batch(norm)
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.lerp_((joined[:-1] / count).to(norm.running_mean.dtype), factor)
            unbiased = var * (count / (count - 1))
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), factor)
    out = centred * (var + norm.eps).rsqrt()[:, None, None]
    if norm.weight is not None:
        out = out * norm.weight[:, None, None] + norm.bias[:, None, None]
    return out.to(x.dtype)
