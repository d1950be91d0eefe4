"""CUDA 12's own compiler takes the device code of every CUDA kernel: the cu126 and cu128 wheels."""

import pytest
import tomllib

from tests.gpu_proof.compiled.nvrtc import Nvrtc
from tests.gpu_proof.compiled.test_cuda import SOURCES
from tools.variants import VARIANTS


def ends(variant: str) -> set[int]:
    """The oldest and the newest architecture of a wheel; those between add time and no news."""
    names = VARIANTS[variant].arch_list.removesuffix("+PTX").split(";")
    return {int(names[0].replace(".", "")), int(names[-1].replace(".", ""))}


@pytest.fixture(scope="module")
def nvrtc():
    return Nvrtc()


@pytest.mark.parametrize("architecture", sorted(ends("cu126") | ends("cu128")))
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_compile(nvrtc, source, architecture):
    assert nvrtc.version[0] == 12
    cubin = nvrtc.compile(source, architecture)
    for kernel in tomllib.loads(source.with_suffix(".budget.toml").read_text()):
        assert f"{len(kernel)}{kernel}".encode() in cubin, f"{kernel} was not compiled"


def test_errors_are_seen(nvrtc, tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void kernel(float* x) { x = unknown; }")
    with pytest.raises(RuntimeError, match="unknown"):
        nvrtc.compile(source, 90)
