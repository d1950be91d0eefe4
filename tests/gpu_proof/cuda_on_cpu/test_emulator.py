"""The proof finds the faults that it is there for."""

import pytest

from tests.gpu_proof.cuda_on_cpu.emulator import compile_program, run_program

ORDERS = ("forward", "backward", "shuffled")


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return compile_program("faults", tmp_path_factory.mktemp("faults"))


def values(program, fault, order):
    result = run_program(program, fault, order)
    assert result.returncode == 0, result.stderr.decode()
    return [float(value) for value in result.stdout.split()]


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_and_shared_memory(faults, order):
    assert values(faults, "none", order) == list(map(float, reversed(range(64))))


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles(faults, order):
    low, high = float(sum(range(32))), float(sum(range(32, 64)))
    assert values(faults, "warp sum", order) == [low] * 32 + [high] * 32


@pytest.mark.parametrize("fault", ["missing barrier", "race between blocks"])
def test_results_show_a_race(faults, fault):
    results = {str(values(faults, fault, order)) for order in ORDERS}
    assert len(results) > 1


def test_a_missing_barrier_reads_nan(faults):
    assert any(value != value for value in values(faults, "missing barrier", "forward"))


@pytest.mark.parametrize("fault", ["divergent barrier", "divergent shuffle"])
def test_a_barrier_that_some_threads_miss(faults, fault):
    result = run_program(faults, fault, "forward")
    assert result.returncode == 3
    assert b"barrier that others do not reach" in result.stderr


@pytest.mark.parametrize("fault", ["overrun", "shared overrun"])
def test_accesses_out_of_bounds(faults, fault):
    result = run_program(faults, fault, "forward")
    assert result.returncode not in (0, 3)
    assert b"heap-buffer-overflow" in result.stderr
