"""Ops in several threads and in worker processes: the same bits as in one."""

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.numbers import relative_error
from tests.robustness.calls import CALLS, MODULES, equal, make_module, run

THREADS = 8


@pytest.mark.parametrize("name", CALLS)
def test_eight_threads(name):
    seeds = range(2 * THREADS)
    # Made beforehand: their random initial values come from a global generator.
    modules = [make_module(name, seed) if name in MODULES else None for seed in seeds]
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(run, repeat(name), seeds, modules))
    for seed, result in zip(seeds, results, strict=True):
        assert equal(result, run(name, seed)), seed


class Results(Dataset):
    """The results of every call, computed where the item is asked for."""

    def __len__(self):
        return len(CALLS)

    def __getitem__(self, index):
        return run(CALLS[index], index)


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_a_data_loader(method, workers):
    run("SqueezeExcite", 0)  # starts this process's threads
    torch.set_num_threads(1)  # as workers do
    expected = [Results()[index] for index in range(len(CALLS))]
    loader = DataLoader(
        Results(),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=method,
        timeout=300,
    )
    for name, result, wanted in zip(CALLS, loader, expected, strict=True):
        assert equal(result, wanted), name


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_any_number_of_threads(name, threads):
    """Sums may be in another order, nothing else."""
    expected = run(name, 0)
    torch.set_num_threads(threads)
    for actual, wanted in zip(run(name, 0), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-5
