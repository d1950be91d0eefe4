import platform

import torch

from benchmarks import peers


def pytest_terminal_summary(terminalreporter):
    if not peers.rows:
        return
    terminalreporter.section("medians of interleaved runs")
    terminalreporter.write_line(
        f"{_device()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"kernels: {torch.ops.dlkernels.cpu_capability()}"
    )
    columns = list(dict.fromkeys(name for row in peers.rows for name in row))
    widths = {
        name: max(len(name), *(len(_cell(row, name)) for row in peers.rows)) for name in columns
    }
    terminalreporter.write_line("  ".join(name.ljust(widths[name]) for name in columns))
    for row in peers.rows:
        terminalreporter.write_line(
            "  ".join(_cell(row, name).ljust(widths[name]) for name in columns)
        )


def _cell(row, name):
    value = row.get(name, "")
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _device():
    if peers.DEVICE == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()
