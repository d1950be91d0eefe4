"""The backend choice, and installs that lack something."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlkernels import backend, cli, ops, use_backend
from tests.squeeze_excite.cases import make_inputs

PACKAGE = Path(backend.__file__).parent


def python(code: str, folder: Path = PACKAGE.parent, **environment: str):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
    )


def test_cpp_serves_the_cpu():
    assert backend.select("squeeze_excite", torch.ones(1)) == "cpp"
    assert backend.select("squeeze_excite", torch.ones(1).double()) == "reference"


def test_use_backend_nests_and_restores():
    x = torch.ones(1)
    with use_backend("reference"):
        with use_backend("cpp"):
            assert backend.select("squeeze_excite", x) == "cpp"
        assert backend.select("squeeze_excite", x) == "reference"
    assert backend.select("squeeze_excite", x) == "cpp"


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of cpp.*'cudnn'"):
        use_backend("cudnn").__enter__()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_backend_that_cannot_serve_says_why(name):
    with use_backend(name), pytest.raises(RuntimeError, match=f"'{name}' cannot serve"):
        ops.squeeze_excite(*make_inputs((1, 4, 2, 2, 2)).tensors)


def test_info_names_every_op_and_backend():
    text = cli.info_text()
    assert "squeeze_excite_backward" in text
    assert all(name in text for name in backend.BACKENDS)
    assert f"CPU kernels in use: {torch.ops.dlkernels.cpu_capability()}" in text


def test_environment_variable_forces_a_backend():
    code = "import torch; from dlkernels import backend; {}"
    choice = code.format("print(backend.select('squeeze_excite', torch.ones(1)))")
    assert python(choice, DLKERNELS_BACKEND="reference").stdout.strip() == "reference"
    assert "DLKERNELS_BACKEND must be one of" in python(choice, DLKERNELS_BACKEND="x").stderr


def test_pure_python_install_warns_once_and_works(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "dlkernels", ignore=shutil.ignore_patterns("*.so"))
    code = """
import warnings, torch
from dlkernels import nn
module = nn.SqueezeExcite(8, 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        module(torch.randn(1, 8, 4, 4)).sum().backward()
print(len(caught), caught[0].message)
"""
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1 dlkernels runs its plain PyTorch formulas")


def test_torch_that_does_not_fit_is_an_import_error(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"needs torch>=2\.13, but torch 2\.9\.1 .*Upgrade"):
        backend._check_torch()


def test_library_that_does_not_load_is_an_import_error(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "dlkernels")
    (tmp_path / "dlkernels" / "libdlkernels_cpu.so").write_bytes(b"no library")
    result = python("import dlkernels", tmp_path)
    assert "ImportError: libdlkernels_cpu.so was built for torch" in result.stderr
    assert "Build dlkernels again" in result.stderr
