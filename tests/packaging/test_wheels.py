"""Each wheel that can be built here: what it says, what it holds, and that it works installed."""

import json
import subprocess
import sys
import zipfile

from tools import wheel_table

SMOKE_TEST = """
import json, torch, dlkernels
from dlkernels import backend, ops
weights = [torch.randn(size) for size in ((4, 16), (4,), (16, 4), (16,))]
x = torch.randn(2, 16, 5, 5, requires_grad=True)
out = ops.squeeze_excite(x, *weights)
out.sum().backward()
with dlkernels.use_backend("reference"):
    expected = ops.squeeze_excite(x, *weights)
print(json.dumps({
    "folder": dlkernels.__file__,
    "error": (out - expected).abs().max().item(),
    "serves": backend.select("squeeze_excite", x),
    "archs": backend.info.cuda_arch_list,
    "table": backend.availability()["squeeze_excite"],
}))
"""

OTHER_CUDA = """
import torch
torch.version.cuda = "11.8"
from dlkernels.cli import info_text
print(info_text())
"""

SNIPPET = """
import torch
import dlkernels
from dlkernels import nn, ops

module: torch.nn.Module = nn.SqueezeExcite(16, 4)
out: torch.Tensor = ops.squeeze_excite(
    torch.ones(1, 16, 2, 2), torch.ones(4, 16), None, torch.ones(16, 4), None
)
report = dlkernels.accelerate(torch.nn.Sequential(module))
report.restore()
"""


def is_for_cuda(wheel):
    return "+cu" in wheel.name


def test_name_and_metadata(wheel):
    variant = wheel.name.split("+")[1].split("-")[0]
    assert wheel.name.startswith(f"dlkernels-0.1.0+{variant}-cp{sys.version_info[0]}")
    assert "-manylinux_2_" in wheel.name
    check = [sys.executable, "-m", "twine", "check", "--strict", wheel]
    result = subprocess.run(check, capture_output=True, text=True)
    assert "PASSED" in result.stdout, result.stdout


def test_contents(wheel):
    assert wheel.stat().st_size < 20 * 2**20
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"dlkernels/py.typed", "dlkernels/libdlkernels_cpu.so"} <= names
    assert ("dlkernels/libdlkernels_cuda.so" in names) == is_for_cuda(wheel)
    outside = {name for name in names if not name.startswith(("dlkernels/", "dlkernels-"))}
    assert not outside, "torch's libraries, or tests, were packed"


def test_policy(wheel):
    show = [sys.executable, "-m", "auditwheel", "show", wheel]
    shown = subprocess.run(show, capture_output=True, text=True).stdout
    assert "manylinux_2_" in shown
    assert "libgomp" not in shown, "a second OpenMP"


def test_installed_outside_the_source_tree(wheel, installed):
    result = installed.run("-c", SMOKE_TEST)
    assert result.returncode == 0, result.stderr
    assert str(installed.folder) in result.stdout
    printed = json.loads(result.stdout)
    assert printed["serves"] == "cpp"
    assert printed["error"] < 1e-6
    assert bool(printed["archs"]) == is_for_cuda(wheel)
    if not is_for_cuda(wheel):
        assert "DLKERNELS_CUDA=0" in printed["table"]["cuda"]


def test_info_says_why_cuda_is_not_there(wheel, installed):
    shown = installed.run("-c", OTHER_CUDA).stdout
    assert "cpp" in shown
    if is_for_cuda(wheel):
        assert "but torch 2." in shown
        assert "uses CUDA 11.8; install the dlkernels built for CUDA 11.8" in shown
    else:
        assert "DLKERNELS_CUDA=0" in shown


def test_another_torch_than_it_needs(installed):
    result = installed.run("-c", "import torch; torch.__version__ = '2.9.1'; import dlkernels")
    assert result.returncode != 0
    assert "ImportError: dlkernels was built for torch 2." in result.stderr
    assert "needs torch>=2.13, but torch 2.9.1 is installed. Upgrade torch" in result.stderr


def test_type_hints_of_a_users_code(built, environment):
    environment.install(built("cpu"))
    (environment.folder / "snippet.py").write_text(SNIPPET)
    result = environment.run("-m", "mypy", "--strict", "snippet.py")
    assert "Success" in result.stdout, result.stdout


def test_the_table_of_the_docs_is_made_from_wheels(wheel):
    cells = wheel_table.row(wheel)
    assert len(cells) == len(wheel_table.HEAD)
    assert cells[0].strip("`") in wheel.name
    assert (cells[6] == "8.0 9.0 10.0+PTX") == is_for_cuda(wheel)
