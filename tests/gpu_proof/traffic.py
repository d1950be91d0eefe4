"""Counts the bytes that Triton kernels load and store, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from tests.gpu_proof.record import record

SECTOR = 32


@dataclass
class Traffic:
    """Bytes moved between kernels and global memory.

    Attributes:
        loaded: bytes that unmasked lanes asked for.
        stored: bytes that unmasked lanes wrote.
        sectors: bytes of the distinct 32-byte sectors behind each access: what the memory moves.
        l2: bytes of the distinct sectors that each program loads, and of those that it stores: what
            the L2 cache moves if all that a program reads again is still in the L1 cache.
        memory: bytes of the distinct sectors that each launch loads, and of those that it stores:
            what the memory moves if all that a launch reads again is still in the L2 cache.
    """

    loaded: int = 0
    stored: int = 0
    sectors: int = 0
    l2: int = 0
    memory: int = 0
    atomics: int = field(default=0)

    @property
    def moved(self) -> int:
        return self.loaded + self.stored


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts what kernels run in the ``with`` block load and store."""
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic, run = InterpreterBuilder.create_atomic_rmw, GridExecutor.__call__
    set_program = InterpreterBuilder.set_grid_idx
    # Sectors that are loaded and stored: by the running program, by the running launch.
    program: tuple[set[int], set[int]] = (set(), set())
    launch: tuple[set[int], set[int]] = (set(), set())

    def counted_load(builder: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        traffic.loaded += _bytes(ptrs, mask)
        traffic.sectors += _add_sectors(ptrs, mask, program[0])
        return load(builder, ptrs, mask, *args)

    def counted_store(builder: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        traffic.stored += _bytes(ptrs, mask)
        traffic.sectors += _add_sectors(ptrs, mask, program[1])
        return store(builder, ptrs, value, mask, *args)

    def counted_atomic(builder: Any, *args: Any) -> Any:
        traffic.atomics += 1
        return atomic(builder, *args)

    def end_program() -> None:
        for sectors, all_sectors in zip(program, launch, strict=True):
            traffic.l2 += SECTOR * len(sectors)
            all_sectors |= sectors
            sectors.clear()

    def counted_set_program(builder: Any, *index: int) -> None:
        end_program()
        set_program(builder, *index)

    def counted_run(executor: Any, *args: Any, **kwargs: Any) -> None:
        run(executor, *args, **kwargs)
        end_program()
        traffic.memory += SECTOR * sum(len(sectors) for sectors in launch)
        for sectors in launch:
            sectors.clear()

    with (
        mock.patch.object(GridExecutor, "__call__", counted_run),
        mock.patch.object(InterpreterBuilder, "set_grid_idx", counted_set_program),
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", counted_atomic),
    ):
        yield traffic
    record(traffic.loaded, traffic.stored)


def _item_size(ptrs: Any) -> int:
    return max(8, ptrs.get_element_ty().primitive_bitwidth) // 8


def _bytes(ptrs: Any, mask: Any) -> int:
    return int(np.count_nonzero(mask.data)) * _item_size(ptrs)


def _add_sectors(ptrs: Any, mask: Any, program: set[int]) -> int:
    """Adds the sectors of an access to those of its program; returns their bytes."""
    addresses = np.asarray(ptrs.data)[np.asarray(mask.data, dtype=bool)]
    sectors = np.unique(addresses // SECTOR)
    program.update(sectors.tolist())
    return SECTOR * sectors.size
