"""The source distribution, with a compiler and without."""

import subprocess
import sys
import tarfile

import pytest

from tests.packaging.conftest import ROOT, without_source_tree

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


def test_a_forced_build_without_a_compiler_fails(source, environment, path_without_compilers):
    result = environment.run(
        *("-m", "pip", "install", "--no-deps", source),
        PATH=path_without_compilers,
        DLKERNELS_FORCE_BUILD="1",
    )
    assert result.returncode != 0
    assert "compiling the kernels failed" in result.stdout + result.stderr
