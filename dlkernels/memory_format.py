"""Memory formats as every op of the library treats them."""

from __future__ import annotations

import torch


def memory_format_of(maps: torch.Tensor) -> torch.memory_format:
    """The format of results shaped like ``maps`` [N, C, H, W].

    channels_last where ``maps`` is that and nothing else, contiguous otherwise (also for strides
    that are neither).
    """
    if not maps.is_contiguous() and maps.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty_maps(maps: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor of the shape, dtype and device of ``maps``, in that format."""
    return torch.empty_like(maps, memory_format=memory_format_of(maps))


def to_format_of(like: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """``maps`` itself where it lies in memory as ``like`` does, else a copy that does."""
    return maps.contiguous(memory_format=memory_format_of(like))
