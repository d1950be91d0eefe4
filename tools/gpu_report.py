"""`make gpu`: runs all tests and benchmarks on a machine with a GPU and writes one report."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "out" / "gpu-report.md"

STEPS = {
    "What this build holds": ["-m", "dlkernels", "info"],
    "Tests": ["-m", "pytest", "tests", "-q"],
    "Triton kernels in the interpreter": ["-m", "pytest", "tests/gpu_proof", "-q"],
    "Benchmarks": ["-m", "dlkernels", "bench"],
    "Page of the benchmarks, out/report.html": ["-m", "dlkernels", "report"],
}


def main() -> int:
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and torch finds none", file=sys.stderr)
        return 1
    REPORT.parent.mkdir(exist_ok=True)
    failures = 0
    with REPORT.open("w") as report:
        report.write(f"# GPU report\n\n{_machine()}\n")
        for title, arguments in STEPS.items():
            interpret = {"TRITON_INTERPRET": "1"} if "interpreter" in title else {}
            code, output = _run(arguments, interpret)
            failures += code != 0
            report.write(f"\n## {title}: {'ok' if code == 0 else 'FAILED'}\n\n```\n{output}```\n")
    print(f"the report is in {REPORT.relative_to(ROOT)}")
    return 1 if failures else 0


def _machine() -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    gpus = ", ".join(
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    )
    return (
        f"{gpus}; {platform.platform()}; Python {platform.python_version()}, torch "
        f"{torch.__version__}, CUDA {torch.version.cuda}; commit {commit}"
    )


def _run(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Runs a step, shows its output as it comes, and returns it."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
