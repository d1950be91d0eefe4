"""Blocks built around layers that exist, which keep their names and parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def add_parts(block: nn.Module, parts: Mapping[str, nn.Module], names: Mapping[str, str]) -> None:
    """Registers each part under its name in the block, with dots where it lies deeper."""
    for part, name in names.items():
        parent = block
        *folders, last = name.split(".")
        for folder in folders:
            if folder not in parent._modules:
                parent.add_module(folder, nn.Module())
            parent = parent.get_submodule(folder)
        parent.add_module(last, parts[part])
