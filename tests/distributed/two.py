"""A function in two processes that talk by gloo."""

import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _main(rank: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        torch.save(function(rank, *arguments), os.path.join(folder, f"{rank}.pt"))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def in_two_processes(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(rank, *arguments)`` returns in each process."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_main, (folder, function, arguments), nprocs=2, start_method="fork")
        return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(2)]
