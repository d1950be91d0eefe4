"""Each wheel that can be built here: what it says, what it holds, and that it works installed."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.packaging.conftest import ROOT
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

OTHER_TORCH = "import torch; torch.__version__ = '2.9.1'; import dlkernels"

OTHER_CUDA = """
import torch
torch.version.cuda = {cuda!r}
from dlkernels.cli import info_text
print(info_text())
"""

SOURCE_TREE = """
import torch, dlkernels
print(dlkernels.__file__)
dlkernels.nn.SqueezeExcite(8, 2)(torch.randn(1, 8, 4, 4))
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


def test_it_names_no_folder_of_the_machine_that_built_it(wheel):
    folders = [str(ROOT).encode(), str(Path(torch.__file__).parents[1]).encode()]
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert not [folder for folder in folders if folder in content], name


def test_policy(wheel):
    show = [sys.executable, "-m", "auditwheel", "show", "--json", wheel]
    shown = json.loads(subprocess.run(show, capture_output=True, check=True).stdout)
    assert shown["sym_tag"] in wheel.name
    # Of what no system provides, only the libraries that torch has loaded are used.
    allowed = {"libc10.so", "libtorch_cpu.so"}
    if is_for_cuda(wheel):
        allowed |= {"libtorch_cuda.so", f"libcudart.so.{torch.version.cuda.split('.')[0]}"}
    assert set(shown["external_libs"]) == allowed


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


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        ("11.8", "uses CUDA 11.8; install the dlkernels built for CUDA 11.8, or a torch built for"),
        (None, "is a CPU build; for GPUs install a torch built for CUDA"),
    ],
)
def test_info_says_why_cuda_is_not_there(cuda, message, wheel, installed):
    shown = installed.run("-c", OTHER_CUDA.format(cuda=cuda)).stdout
    assert shown.startswith(f"dlkernels {wheel.name.split('-')[1]}, torch 2.")
    assert "cpp" in shown
    if is_for_cuda(wheel):
        assert "but torch 2." in shown
        assert message in shown
    else:
        assert "DLKERNELS_CUDA=0" in shown


def test_another_torch_than_it_needs(installed):
    result = installed.run("-c", OTHER_TORCH)
    assert result.returncode != 0
    assert (
        "ImportError: dlkernels needs torch>=2.13, but torch 2.9.1 is installed. Upgrade torch "
        "(pip install --upgrade 'torch>=2.13')."
    ) in result.stderr


def test_the_pip_that_comes_with_python(built, isolated_environment):
    isolated_environment.install(built("cpu"))
    installed = isolated_environment.packages / "dlkernels"
    assert (installed / "libdlkernels_cpu.so").is_file()


def test_source_tree_on_the_path(built, environment, tmp_path):
    environment.install(built("cpu"))
    tree = tmp_path / "tree"
    for part in ("csrc", "dlkernels"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("*.so"))
    result = environment.run("-c", SOURCE_TREE, PYTHONPATH=str(tree))
    assert result.returncode == 0, result.stderr
    assert str(tree) in result.stdout
    assert result.stderr.count("UserWarning") == 1
    assert f"is imported from its source tree {tree}, which is not built" in result.stderr
    assert "start Python elsewhere to use an installed dlkernels" in result.stderr


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
