"""The rules of docs/architecture.md that code can hold."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from native_build import COMMON_FLAGS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dlkernels"
FAMILIES = sorted(path.parent.name for path in PACKAGE.glob("*/reference.py"))
SHARED = {"batch_norm_act", "boxes", "pointwise_conv"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("dlkernels")}


def test_there_are_families():
    assert "squeeze_excite" in FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_imports_go_one_way(family):
    forbidden = {
        "reference.py": ("op", "modules", "triton"),
        "triton.py": ("op", "modules", "reference"),
        "op.py": ("modules",),
    }
    others = set(FAMILIES) - {family} - SHARED
    for path in (PACKAGE / family).glob("*.py"):
        used = imports(path)
        for name in forbidden.get(path.name, ()):
            assert f"dlkernels.{family}.{name}" not in used, f"{path.name} imports {name}"
        for other in others:
            assert not any(name.startswith(f"dlkernels.{other}") for name in used), path
        assert not any(name.startswith("dlkernels.models") for name in used), path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_same_stem_in_every_layer(family):
    for name in ("reference.py", "op.py"):
        assert (PACKAGE / family / name).is_file()
    assert (ROOT / "csrc" / "cpu" / f"{family}.cpp").is_file()
    assert (ROOT / "csrc" / "cpu" / "kernels" / f"{family}.cpp").is_file()
    assert (ROOT / "tests" / family).is_dir()
    assert (ROOT / "benchmarks" / f"bench_{family}.py").is_file()


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_kernel_objects_hold_no_weak_symbols():
    objects = sorted(ROOT.glob("build/temp*/cpu.kernels.*.o"))
    assert len(objects) >= len(FAMILIES)
    for path in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True).stdout
        weak = [line for line in symbols.splitlines() if " W " in line or " V " in line]
        assert not weak, f"{path.name}: {weak}"


CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.skipif(CROSS_COMPILER is None, reason="needs a cross compiler for aarch64")
def test_kernels_are_not_tied_to_x86():
    sources = sorted((ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp"))
    options = [*COMMON_FLAGS, "-DDLKERNELS_CPU_CAPABILITY=cpu_default", "-fsyntax-only"]
    result = subprocess.run([CROSS_COMPILER, *options, *sources], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
