"""Compiles CUDA kernels as C++ for the CPU and runs them, under AddressSanitizer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = [
    *("-std=c++20", "-O1", "-g", "-fno-omit-frame-pointer", "-Wno-unknown-pragmas"),
    *("-mf16c", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("-x", "c++", "-DDLKERNELS_CUDA_ON_CPU", f"-I{HERE}"),
]


def compile_program(name: str, folder: Path) -> Path:
    """The program ``<name>.cpp`` of this folder, compiled into ``folder``."""
    program = folder / name
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *FLAGS, HERE / f"{name}.cpp", "-o", program], check=True)
    return program


def run_program(program: Path, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess:
    # Fibers have stacks of their own, which confuses the two checks that are off.
    options = "detect_stack_use_after_return=0:detect_leaks=0"
    return subprocess.run(
        [program, *arguments],
        input=given,
        capture_output=True,
        env={**os.environ, "ASAN_OPTIONS": options},
    )
