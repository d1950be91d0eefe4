"""The toolkit finder says what it found and what to set."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import cuda_toolkit
from cuda_toolkit import CudaError, Toolkit, find_toolkit, gencode_flags


def fake_toolkit(folder: Path, version: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(0o755)
    return folder


def test_explicit_home_that_fits(tmp_path):
    home = fake_toolkit(tmp_path / "cuda", "13.1")
    assert find_toolkit("13.0", {"CUDA_HOME": str(home)}) == Toolkit(home, "13.1")


def test_explicit_home_is_final(tmp_path):
    with pytest.raises(CudaError, match=r"no CUDA toolkit.*set CUDA_HOME.*DLKERNELS_CUDA=0"):
        find_toolkit("13.0", {"CUDA_HOME": str(tmp_path)})


def test_other_major_version(tmp_path):
    home = fake_toolkit(tmp_path / "cuda", "12.8")
    with pytest.raises(CudaError, match=r"is CUDA 12\.8, but torch was built for CUDA 13\.0"):
        find_toolkit("13.0", {"CUDA_HOME": str(home), "DLKERNELS_CUDA": "1"})


def test_demanded_but_torch_is_a_cpu_build():
    with pytest.raises(CudaError, match="DLKERNELS_CUDA=1, but the installed torch is a CPU"):
        find_toolkit(None, {"DLKERNELS_CUDA": "1"})


def test_left_out():
    assert "on demand" in find_toolkit("13.0", {"DLKERNELS_CUDA": "0"})
    assert "CPU build" in find_toolkit(None, {})
    with pytest.raises(CudaError, match="must be 0, 1 or unset, but is 'yes'"):
        find_toolkit("13.0", {"DLKERNELS_CUDA": "yes"})


def test_nothing_found(monkeypatch):
    monkeypatch.setattr(cuda_toolkit, "_usual_homes", lambda _: iter(()))
    assert "set CUDA_HOME" in find_toolkit("13.0", dict(os.environ, CUDA_HOME="", CUDA_PATH=""))


def test_arch_list():
    assert gencode_flags("8.0;9.0a+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    with pytest.raises(CudaError, match="TORCH_CUDA_ARCH_LIST must look like"):
        gencode_flags("hopper")
