"""The machine code of the CUDA kernels, held to the budget beside them."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import tomllib
import torch

from tests.gpu_proof.machine_code import ARCHITECTURES, read_cubin
from tools.cuda_toolkit import Toolkit, find_toolkit

KERNELS = Path(__file__).parents[3] / "csrc" / "cuda" / "kernels"
SOURCES = sorted(KERNELS.glob("*.cu"))
TOOLKIT = find_toolkit(torch.version.cuda, dict(os.environ))


def test_there_are_kernels():
    assert KERNELS / "squeeze_excite.cu" in SOURCES


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.mark.skipif(not isinstance(TOOLKIT, Toolkit), reason=f"no CUDA compiler: {TOOLKIT}")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_budget(source, architecture, tmp_path):
    cubin = tmp_path / "kernels.cubin"
    subprocess.run(
        [
            *(TOOLKIT.nvcc, "-std=c++20", "-O3", "-cubin", f"-arch=sm_{architecture}"),
            *("-Werror=all-warnings", "-Xptxas=-warn-spills", source, "-o", cubin),
        ],
        check=True,
    )
    budgets = tomllib.loads(source.with_suffix(".budget.toml").read_text())
    seen = set()
    for name, code in read_cubin(cubin.read_bytes()).items():
        (kernel,) = [kernel for kernel in budgets if f"{len(kernel)}{kernel}" in name]
        budget = budgets[kernel]
        seen.add(kernel)
        found = f"{name}: {code}"
        assert code.spills == 0, found
        assert code.registers <= budget["registers"], found
        assert code.shared <= budget["shared"], found
        if re.search(r"Li[48]E", name):  # an instance for aligned vectors
            assert code.wide >= budget["wide"], found
    assert seen == set(budgets)
