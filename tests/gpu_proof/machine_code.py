"""Reads registers, spills, shared memory and access widths from a kernel's machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.gpu_proof.launches import Launch

ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class MachineCode:
    """What the disassembly of one kernel shows.

    Attributes:
        registers: per thread.
        shared: bytes of shared memory per program.
        spills: accesses to local memory, where registers are spilled to.
        widths: bits of every load from and store to global memory.
    """

    registers: int
    shared: int
    spills: int
    widths: list[int]

    @property
    def wide(self) -> float:
        """The share of global accesses that are 128 bits wide or wider."""
        return sum(width >= 128 for width in self.widths) / max(1, len(self.widths))


def compile_ahead(launch: Launch, architecture: int) -> MachineCode:
    """The machine code of a recorded launch for an architecture (90 is sm_90)."""
    source = ASTSource(
        launch.kernel,
        launch.signature,
        launch.constants,
        {(position,): [["tt.divisibility", 16]] for position in launch.divisible},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=launch.options
    )
    code = read_cubin(compiled.asm["cubin"])
    code.shared = max(code.shared, compiled.metadata.shared)
    return code


def read_cubin(cubin: bytes) -> MachineCode:
    """The machine code of the one kernel in a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", path)
        assembly = _run("nvdisasm", "-c", path)
    accesses = re.findall(r"\b(?:LDG|STG)(\.[A-Z0-9_.]+)?", assembly)
    return MachineCode(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        shared=int(re.search(r"SHARED:(\d+)", usage).group(1)),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        widths=[_width(suffix) for suffix in accesses],
    )


def _width(suffix: str) -> int:
    sizes = re.findall(r"\.[US]?(8|16|64|128|256)\b", suffix or "")
    return int(sizes[0]) if sizes else 32


def _run(tool: str, *args: object) -> str:
    command = [TOOLS / tool, *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
