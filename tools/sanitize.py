"""Runs the tests of all ops on CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer.

``python tools/sanitize.py`` builds the kernels into a copy of the package in ``build/sanitize`` and
runs the tests there; arguments are handed to pytest in place of the tests of all ops. The first
fault ends the run, with the sanitizer's report.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import native_build

ROOT = native_build.ROOT
FOLDER = ROOT / "build" / "sanitize"
UNFIT = {
    # Runs no kernel, and torch aborts under the sanitizer where it chooses a convolution of a GPU.
    "test_no_synchronization.py",
    # Limits the address space, where the sanitizer maps memory of its own and ends the process.
    "test_out_of_memory.py",
}
TESTS = ["*/test_numbers.py", "*/test_op.py", "*/test_bad_input.py", "robustness/test_*.py"]
OPTIONS = {
    # Python and torch keep memory until the process ends.
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def build() -> None:
    """A copy of the package and its tests, with kernels that are checked."""
    for name in ("dlkernels", "tests"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, FOLDER / name, ignore=ignored, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", FOLDER)
    native_build.build(
        output=FOLDER / "dlkernels",
        build_dir=FOLDER / "objects",
        info_name=f"_info{sysconfig.get_config_var('EXT_SUFFIX')}",
        version=native_build.read_version(),
        sanitize=True,
    )


def preloaded() -> str:
    """Libraries that must be loaded before Python, which is not built for sanitizers."""
    compiler = native_build.compiler().split()[-1]
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    paths = []
    for name in names:
        command = [compiler, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        paths.append(found)
    return " ".join(paths)


def run(capability: str, tests: list[str]) -> int:
    """Runs tests on the copy for an instruction set; returns pytest's exit code."""
    environment = {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": preloaded(),
        "PYTHONPATH": str(FOLDER),
        "DLKERNELS_CPU_CAPABILITY": capability,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=FOLDER, env=environment).returncode


def main() -> None:
    os.environ["DLKERNELS_CUDA"] = "0"
    build()
    found = [str(path) for name in TESTS for path in sorted((FOLDER / "tests").glob(name))]
    tests = sys.argv[1:] or [path for path in found if Path(path).name not in UNFIT]
    raise SystemExit(max(run(capability, tests) for capability in ("avx2", "default")))


if __name__ == "__main__":
    main()
