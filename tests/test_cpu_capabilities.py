"""Every instruction set that this CPU has passes the numeric tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
LEVELS = ["default", "avx2", "avx512"]
BELOW = LEVELS[: LEVELS.index(torch.ops.dlkernels.cpu_capability())]


@pytest.mark.parametrize("level", BELOW)
def test_lower_level(level):
    code = "import torch, dlkernels; print(torch.ops.dlkernels.cpu_capability())"
    environment = {**os.environ, "DLKERNELS_CPU_CAPABILITY": level}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert shown.stdout.decode().strip() == level
    suites = sorted(str(path) for path in TESTS.glob("*/test_numbers.py"))
    assert suites
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suites],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


def test_unknown_level():
    result = subprocess.run(
        [sys.executable, "-c", "import torch, dlkernels; torch.ops.dlkernels.cpu_capability()"],
        env={**os.environ, "DLKERNELS_CPU_CAPABILITY": "sse9"},
        capture_output=True,
        text=True,
    )
    assert "must be default, avx2 or avx512, but is sse9" in result.stderr
