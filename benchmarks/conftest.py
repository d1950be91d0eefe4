from pathlib import Path

import pytest
import torch

from benchmarks import peers
from dlkernels.bench import add_rows
from dlkernels.machine import machine


def pytest_addoption(parser):
    group = parser.getgroup("dlkernels")
    group.addoption("--rows", type=Path, help="JSON file that the summary's rows are added to")
    group.addoption("--model", help="bench_models.py: the only model, library/name")
    group.addoption("--batch", type=int, default=8, help="bench_models.py: images")
    group.addoption("--size", type=int, default=224, help="bench_models.py: pixels a side")
    group.addoption("--eager-only", action="store_true", help="bench_models.py: no torch.compile")


def pytest_terminal_summary(terminalreporter):
    if not peers.rows:
        return
    terminalreporter.section("medians of interleaved runs")
    where = machine()
    terminalreporter.write_line(
        f"{where['GPU'] if peers.DEVICE == 'cuda' else where['processor']}, {where['threads']} "
        f"threads, torch {torch.__version__}, kernels: {torch.ops.dlkernels.cpu_capability()}"
    )
    shown = [
        {name: value for name, value in row.items() if not isinstance(value, (list, dict))}
        for row in peers.rows
    ]
    columns = list(dict.fromkeys(name for row in shown for name in row))
    widths = {name: max(len(name), *(len(_cell(row, name)) for row in shown)) for name in columns}
    terminalreporter.write_line("  ".join(name.ljust(widths[name]) for name in columns))
    for row in shown:
        terminalreporter.write_line(
            "  ".join(_cell(row, name).ljust(widths[name]) for name in columns)
        )


def pytest_sessionfinish(session):
    path = session.config.getoption("--rows")
    if path and peers.rows:
        add_rows(path, [{**row, "machine": machine()} for row in peers.rows])


@pytest.hookimpl
def pytest_generate_tests(metafunc):
    if "model" in metafunc.fixturenames:
        only = metafunc.config.getoption("--model")
        metafunc.parametrize("model", [only] if only else metafunc.module.MODELS)


def _cell(row, name):
    value = row.get(name, "")
    return f"{value:.2f}" if isinstance(value, float) else str(value)
