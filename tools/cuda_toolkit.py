"""Finds the CUDA toolkit that fits the installed torch, or says why none does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCH_LIST = "8.0;9.0;10.0+PTX"


class CudaError(RuntimeError):
    """CUDA was demanded, or configured, in a way that cannot work."""


@dataclass(frozen=True)
class Toolkit:
    """A folder with bin/nvcc and include/cuda_runtime.h, and its version."""

    home: Path
    version: str

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


def find_toolkit(torch_cuda: str | None, environ: dict[str, str]) -> Toolkit | str:
    """Returns the toolkit to build with, or the reason why CUDA is left out.

    DLKERNELS_CUDA=1 turns every reason into a CudaError, DLKERNELS_CUDA=0 leaves CUDA out.
    An explicit CUDA_HOME or CUDA_PATH is final: when it does not fit, nothing else is tried.
    """
    demand = environ.get("DLKERNELS_CUDA", "")
    if demand == "0":
        return "left out on demand (DLKERNELS_CUDA=0)"
    if demand not in ("", "1"):
        raise CudaError(f"DLKERNELS_CUDA must be 0, 1 or unset, but is {demand!r}")
    explicit = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    found = _search(torch_cuda, explicit)
    if isinstance(found, str) and (demand == "1" or (explicit and torch_cuda)):
        raise CudaError(
            f"{found}. Set DLKERNELS_CUDA=0 to build the CPU kernels alone."
            if demand != "1"
            else f"DLKERNELS_CUDA=1, but {found}."
        )
    return found


def _search(torch_cuda: str | None, explicit: str | None) -> Toolkit | str:
    if torch_cuda is None:
        return "the installed torch is a CPU build (torch.version.cuda is None)"
    if explicit:
        return _inspect(Path(explicit), torch_cuda)
    reasons = []
    for home in _usual_homes(torch_cuda):
        found = _inspect(home, torch_cuda)
        if isinstance(found, Toolkit):
            return found
        reasons.append(found)
    if reasons:
        return reasons[0]
    return (
        f"no CUDA toolkit was found (looked for nvcc on PATH and in /usr/local/cuda*); "
        f"install CUDA {torch_cuda} and set CUDA_HOME to its folder"
    )


def _usual_homes(torch_cuda: str) -> Iterator[Path]:
    on_path = shutil.which("nvcc")
    if on_path:
        top = _top_of(on_path)
        if top:
            yield top
    for name in (f"cuda-{torch_cuda}", f"cuda-{torch_cuda.split('.')[0]}", "cuda"):
        home = Path("/usr/local") / name
        if home.exists():
            yield home


def _top_of(nvcc: str) -> Path | None:
    """The toolkit that an nvcc belongs to: its own word, since it may be a wrapper."""
    result = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    match = re.search(r"^#\$ TOP=(.+)$", result.stderr, re.MULTILINE)
    return Path(match.group(1).strip()).resolve() if match else None


def _inspect(home: Path, torch_cuda: str) -> Toolkit | str:
    nvcc = home / "bin" / "nvcc"
    if not (nvcc.is_file() and (home / "include" / "cuda_runtime.h").is_file()):
        return (
            f"{home} is no CUDA toolkit (bin/nvcc or include/cuda_runtime.h is missing); "
            f"set CUDA_HOME to the folder of a CUDA {torch_cuda} toolkit"
        )
    printed = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", printed)
    if not match:
        return f"{nvcc} --version did not print a release"
    version = match.group(1)
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        return (
            f"the toolkit in {home} is CUDA {version}, but torch was built for CUDA {torch_cuda}; "
            f"set CUDA_HOME to a CUDA {torch_cuda.split('.')[0]} toolkit"
        )
    return Toolkit(home, version)


def gencode_flags(arch_list: str) -> list[str]:
    """Turns TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") into nvcc's flags."""
    flags = []
    for arch in re.split(r"[;\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if not match:
            raise CudaError(
                f"TORCH_CUDA_ARCH_LIST must look like {DEFAULT_ARCH_LIST!r}, but holds {arch!r}"
            )
        number = "".join(match.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
