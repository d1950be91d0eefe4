"""`make gpu` on a machine without a GPU says so; with one it is what runs these tests."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu():
    command = [sys.executable, ROOT / "tools" / "gpu_report.py"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "needs a CUDA device" in result.stderr
