"""The op of docs/new-op.md, built from the page and run."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import native_build

ROOT = Path(__file__).parent.parent

USE = """
import sys
from pathlib import Path
import torch
import dlkernels
from dlkernels import backend

folder = Path(sys.argv[1])
torch.ops.load_library(str(folder / "scale_shift.so"))
dlkernels.__path__.append(str(folder / "dlkernels"))
from dlkernels.scale_shift.op import _OP, reference, scale_shift
from tests.numbers import DTYPES, FORMATS, assert_exact

for dtype in DTYPES:
    for memory_format in FORMATS:
        for shape in ((2, 5, 7, 9), (1, 16, 4, 4)):
            x = torch.randn(shape, dtype=dtype).to(memory_format=memory_format)
            scale, shift = torch.randn(2, shape[1], dtype=dtype)
            assert backend.select("scale_shift", x) == "cpp"
            out = scale_shift(x, scale, shift)
            expected = reference.scale_shift(x.double(), scale.double(), shift.double())
            assert_exact("out", out, expected, 1)
            assert out.is_contiguous(memory_format=memory_format)
assert scale_shift(x[:0], scale, shift).shape == x[:0].shape
leaves = [torch.randn(shape).requires_grad_() for shape in ((2, 3, 2, 2), 3, 3)]
torch.library.opcheck(_OP, leaves)
scale_shift(*leaves).square().sum().backward()
doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
reference.scale_shift(*doubles).square().sum().backward()
for leaf, double in zip(leaves, doubles):
    assert_exact("gradient", leaf.grad, double.grad, 8)
try:
    scale_shift(x, scale[:1], shift)
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the page, beside the headers that they include."""
    folder = tmp_path_factory.mktemp("tutorial")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    page = (ROOT / "docs" / "new-op.md").read_text()
    files = re.findall(r"```\w+\n(?:#|//) ((?:dlkernels|csrc)/\S+)\n(.+?)```", page, re.DOTALL)
    assert len(files) == 5
    for name, text in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "dlkernels" / "scale_shift" / "__init__.py").touch()
    return folder


@pytest.fixture(scope="module")
def library(folder):
    torch = native_build.find_torch()
    compiler = native_build.compiler().split()
    common = [*native_build.COMMON_FLAGS, "-O1", "-Werror", native_build.TARGET_FLAG]
    jobs: list[tuple[str, str, list[str]]] = [("capability", "", []), ("scale_shift", "", [])]
    for capability, flags in native_build.CPU_CAPABILITIES.items():
        define = f"-DDLKERNELS_CPU_CAPABILITY={capability}"
        jobs.append(("kernels/scale_shift", capability, [define, *flags]))

    def compile_one(job: tuple[str, str, list[str]]) -> Path:
        source, capability, flags = job
        output = (folder / source).with_suffix(f".{capability}.o")
        output.parent.mkdir(exist_ok=True)
        command = [*compiler, *common, *flags, "-isystem", f"{torch.home}/include"]
        command += ["-c", f"csrc/cpu/{source}.cpp", "-o", str(output)]
        subprocess.run(command, cwd=folder, check=True)
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    library = folder / "scale_shift.so"
    link = ["-shared", *objects, f"-L{torch.home}/lib", "-lc10", "-ltorch_cpu", "-o", library]
    subprocess.run([*compiler, *link], check=True)
    return library


def test_the_op_is_built_and_right(folder, library):
    result = subprocess.run(
        [sys.executable, "-c", USE, folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("scale must have shape [16]"), result.stdout
