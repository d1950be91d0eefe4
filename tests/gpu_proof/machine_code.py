"""Reads registers, spills, shared memory and access widths from a kernel's machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dlkernels.triton_support import Budget
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
        widths: bits of every load from and store to global memory; LDGSTS loads to shared memory.
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
        {position: [["tt.divisibility", 16]] for position in launch.divisible},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=launch.options
    )
    (code,) = read_cubin(compiled.asm["cubin"]).values()
    code.shared = max(code.shared, compiled.metadata.shared)
    return code


def read_cubin(cubin: bytes) -> dict[str, MachineCode]:
    """The machine code of each kernel in a cubin, by its (mangled) name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", path)
        assembly = _run("nvdisasm", "-c", path)
    bodies = re.split(r"^\.text\.([^:\s]+):$", assembly, flags=re.MULTILINE)[1:]
    resources = {
        name: (int(registers), int(shared))
        for name, registers, shared in re.findall(
            r"Function (\S+):\s+REG:(\d+) .*?SHARED:(\d+)", usage
        )
    }
    return {
        name: _machine_code(body, *resources[name])
        for name, body in zip(bodies[::2], bodies[1::2], strict=True)
    }


def _machine_code(assembly: str, registers: int, shared: int) -> MachineCode:
    accesses = re.findall(r"\b(?:LDG|LDGSTS|STG)\b(\.[A-Z0-9_.]+)?", assembly)
    spills = len(re.findall(r"\b(?:LDL|STL)\b", assembly))
    return MachineCode(registers, shared, spills, [_width(suffix) for suffix in accesses])


def _width(suffix: str) -> int:
    sizes = re.findall(r"\.[US]?(8|16|64|128|256)\b", suffix or "")
    return int(sizes[0]) if sizes else 32


def _run(tool: str, *args: object) -> str:
    command = [TOOLS / tool, *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assert_within_budgets(
    launches: Iterable[Launch], architecture: int, budgets: Mapping[str, Budget]
) -> None:
    """Every launch keeps to the budget of its kernel, and never spills."""
    for launch in launches:
        code = compile_ahead(launch, architecture)
        budget = budgets[launch.name]
        found = f"{launch.name}: {code}"
        assert code.spills == 0, found
        assert code.registers <= budget.registers, found
        assert code.shared <= budget.shared, found
        assert code.wide >= budget.wide, found
