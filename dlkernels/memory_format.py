"""Memory formats as every op of the library treats them."""

from __future__ import annotations

from collections.abc import Sequence

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


def new_maps(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Uninitialised maps [N, C, H, W] of another shape, in the memory format of ``like``."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=memory_format_of(like)
    )


def columns(maps: torch.Tensor) -> torch.Tensor:
    """A column of channels for each pixel, [C, N * H * W]; channels_last maps are not copied."""
    return maps.transpose(0, 1).flatten(1)


def finest(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """The level of a pyramid with the most pixels, which decides on the format of its results."""
    return max(features, key=lambda x: x.shape[2])
