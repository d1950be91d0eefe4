"""What figures were measured on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

from dlkernels.version import __version__


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the source tree that the package is in, ``""`` for an installed one."""
    command = ["git", "describe", "--always", "--dirty"]
    root = Path(__file__).parent.parent
    if not (root / "csrc").is_dir():
        return ""
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def machine() -> dict[str, str]:
    """Processor, GPUs, system, versions, threads and commit, by their names."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": cpu_name(),
        "GPU": ", ".join(gpus) or "none",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "dlkernels": __version__,
        "commit": commit() or "unknown",
        "threads": str(torch.get_num_threads()),
    }
