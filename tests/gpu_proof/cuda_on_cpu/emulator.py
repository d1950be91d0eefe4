"""Compiles CUDA kernels as C++ for the CPU and runs them, under AddressSanitizer or counted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.gpu_proof.record import record

HERE = Path(__file__).parent
FLAGS = [
    *("-std=c++20", "-O1", "-g", "-fno-omit-frame-pointer", "-Wno-unknown-pragmas"),
    *("-mf16c", "-x", "c++", "-DDLKERNELS_CUDA_ON_CPU", f"-I{HERE}"),
]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Each access calls a function of traffic.h.
COUNTED = [
    *("-DDLKERNELS_COUNT_TRAFFIC", "-fsanitize=kernel-address"),
    *("--param", "asan-instrumentation-with-call-threshold=0"),
    *("--param", "asan-stack=0", "--param", "asan-globals=0"),
]


def compile_program(name: str, folder: Path, extra: list[str] = SANITIZED) -> Path:
    """The program ``<name>.cpp`` of this folder, compiled into ``folder``."""
    program = folder / name
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *FLAGS, *extra, HERE / f"{name}.cpp", "-o", program], check=True)
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


def traffic_of(result: subprocess.CompletedProcess) -> list[tuple[int, int]]:
    """Bytes that each launch of a counted program loaded from and stored to global memory."""
    lines = [line.split() for line in result.stderr.decode().splitlines()]
    moved = [(int(loaded), int(stored)) for word, loaded, stored in lines if word == "traffic"]
    record(sum(loaded for loaded, _ in moved), sum(stored for _, stored in moved))
    return moved
