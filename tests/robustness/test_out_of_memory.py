"""A training step that runs out of memory leaves running statistics and parameters as they were.

In a process of its own, whose address space may grow a little further at each attempt, so that in
turn every large allocation of the forward pass fails.
"""

import os
import resource
import subprocess
import sys

import pytest
import torch

from tests.robustness.calls import MODULES, equal, make_module, step

STEP = 1 << 18  # bytes; a map has more
SHAPE = (4, 16, 48, 48)


def address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def state_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in module.state_dict().values()]


def attempt(module: torch.nn.Module, x: torch.Tensor, more: int) -> bool:
    """Whether the forward pass succeeds in so many bytes more than there are now."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + more, hard))
    try:
        module(x)
    except (RuntimeError, MemoryError):
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return True


def main(name: str) -> None:
    torch.set_num_threads(1)
    # oneDNN's convolutions crash where their scratch space cannot be allocated.
    torch.backends.mkldnn.set_flags(_enabled=False)
    x = torch.randn(SHAPE)
    step(make_module(name), x)  # what is loaded and kept at the first use
    module = make_module(name)
    before = state_of(module)
    failures = 0
    while not attempt(module, x, failures * STEP):
        failures += 1
        assert equal(state_of(module), before), f"{name} after failure {failures}"
    assert failures >= 2, failures
    fresh = make_module(name)
    fresh(x)
    assert equal(state_of(module), state_of(fresh))
    assert equal(step(module, x), step(fresh, x))
    print(f"failed {failures} times")


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process by what /proc says")
@pytest.mark.parametrize("name", MODULES)
def test_statistics_and_parameters(name):
    code = f"from tests.robustness.test_out_of_memory import main; main({name!r})"
    # Each large block is mapped alone and given back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("failed"), result.stdout
