"""The source distribution, with a compiler and without."""

import subprocess
import sys
import tarfile

import pytest
import torch

from tests.packaging.conftest import ROOT, without_source_tree
from tests.packaging.test_wheels import OTHER_TORCH
from tests.test_cuda_toolkit import fake_toolkit

PURE = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dlkernels
    module = dlkernels.nn.SqueezeExcite(8, 2)
    for _ in range(2):
        module(torch.randn(1, 8, 4, 4)).sum().backward()
print(len(caught), caught[0].message)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder],
        cwd=ROOT,
        env=without_source_tree(),
        check=True,
    )
    (path,) = folder.glob("dlkernels-*.tar.gz")
    return path


@pytest.fixture(scope="module")
def path_without_compilers(tmp_path_factory):
    """A folder for PATH that holds what pip needs, and no compiler."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "sh").symlink_to("/bin/sh")
    return str(folder)


def test_holds_every_source(source):
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "dlkernels", "tools", "setup.py", "pyproject.toml", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert set(tracked) <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]


def test_without_a_compiler_it_is_pure_python(source, environment, path_without_compilers):
    environment.install(source, PATH=path_without_compilers)
    result = environment.run("-c", PURE)
    assert result.stdout.startswith("1 dlkernels runs its plain PyTorch formulas"), result.stderr
    assert "no C++ compiler was found when dlkernels was installed" in result.stdout
    assert "no C++ compiler" in environment.run("-m", "dlkernels", "info").stdout
    result = environment.run("-c", OTHER_TORCH)
    assert "ImportError: dlkernels needs torch>=2.13, but torch 2.9.1" in result.stderr


# Notes its arguments, and makes an empty file of what it is to compile.
STAND_IN_COMPILER = """#!/bin/sh
echo "$@" >> {log}
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""


def test_an_isolated_build_takes_the_torch_that_is_there(source, isolated_environment, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(STAND_IN_COMPILER.format(log=tmp_path / "log"))
    compiler.chmod(0o755)
    isolated_environment.install(source, CXX=str(compiler), DLKERNELS_CUDA="0")
    installed = isolated_environment.packages / "dlkernels"
    assert (installed / "libdlkernels_cpu.so").is_file()
    assert list(installed.glob("_info.*.so"))
    commands = (tmp_path / "log").read_text()
    assert f"-isystem {isolated_environment.packages}/torch/include" in commands
    assert commands.count("torch/include") == len(list(ROOT.glob("csrc/cpu/*.cpp"))) + 1


@pytest.mark.parametrize(
    ("torch_version", "message"),
    [
        (None, "torch is not installed in this environment; install torch>=2.13 first"),
        ("2.9.1", "but dlkernels needs torch>=2.13; upgrade torch and build again"),
    ],
)
def test_a_build_without_a_torch_that_fits_ends_in_one_message(
    torch_version, message, source, isolated_environment
):
    isolated_environment.replace_torch(torch_version)
    result = isolated_environment.try_to_install(source, CXX="true")
    assert result.returncode != 0
    shown = result.stdout + result.stderr
    assert shown.count("dlkernels: torch ") == 1
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("demand", ["DLKERNELS_FORCE_BUILD", "DLKERNELS_CUDA"])
def test_a_demanded_build_without_a_compiler_fails(
    source, environment, path_without_compilers, demand
):
    result = environment.try_to_install(
        "--no-build-isolation", source, **{"PATH": path_without_compilers, demand: "1"}
    )
    assert result.returncode != 0
    shown = result.stdout + result.stderr
    messages = ["compiling the kernels failed", "DLKERNELS_CUDA=1, but"]
    assert any(f"dlkernels: {message}" in shown for message in messages)


@pytest.mark.parametrize(
    ("home", "message"),
    [
        ("nothing", "nothing is no CUDA toolkit (bin/nvcc or include/cuda_runtime.h is missing)"),
        ("cuda11", "cuda11 is CUDA 11.8, but torch was built for CUDA"),
    ],
)
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch that was built for CUDA")
def test_a_wrong_cuda_home_ends_in_one_message(home, message, source, environment, tmp_path):
    fake_toolkit(tmp_path / "cuda11", "11.8")
    result = environment.try_to_install(
        "--no-build-isolation", source, CUDA_HOME=str(tmp_path / home)
    )
    assert result.returncode != 0
    shown = result.stdout + result.stderr
    assert message in shown
    assert "set CUDA_HOME to" in shown
    assert "Traceback" not in shown
