"""Builds the compiled parts of dlkernels with ninja.

libdlkernels_cpu.so    the CPU kernels, on PyTorch's stable ABI (links c10 and torch_cpu)
libdlkernels_cuda.so   the CUDA kernels, likewise; left out where no toolkit fits
_info                  a pybind11 module that tells what this build holds

Torch is not imported: its headers, libraries and version are read from its folder, so that a
build in an isolated environment uses the torch of the environment it is built for.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from cuda_toolkit import DEFAULT_ARCH_LIST, Toolkit, find_toolkit, gencode_flags

ROOT = Path(__file__).resolve().parent.parent

# The oldest torch whose stable ABI the launchers use.
TARGET_TORCH = (2, 13)
TARGET_FLAG = f"-DTORCH_TARGET_VERSION=0x{(TARGET_TORCH[0] << 56) | (TARGET_TORCH[1] << 48):016x}"

CPU_CAPABILITIES = {"cpu_default": []}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_CAPABILITIES |= {
        "cpu_avx2": ["-mavx2", "-mfma", "-mf16c"],
        "cpu_avx512": [
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
            *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
        ],
    }

COMMON_FLAGS = [
    *("-std=gnu++20", "-O3", "-g0", "-fPIC", "-ffp-contract=fast"),
    *("-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"),
]

# Faults end the process. -O1, since -O3 takes hours over vector code full of checks.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZED_FLAGS = [*SANITIZERS, "-O1", "-g1", "-fno-omit-frame-pointer"]
# Even at -O1 the checked AVX-512 copies take too long: they are built as ever.
NOT_SANITIZED = "cpu_avx512"


class BuildError(RuntimeError):
    """The compiled parts cannot be built here."""


@dataclass(frozen=True)
class Torch:
    """The installed torch, as its own files describe it."""

    home: Path
    version: str
    cuda: str | None


def find_torch() -> Torch:
    """The torch of the environment being built for, also from an isolated build."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    for home in candidates:
        if (home / "version.py").is_file():
            namespace: dict[str, object] = {}
            exec((home / "version.py").read_text(), namespace)
            torch = Torch(home, str(namespace["__version__"]), namespace.get("cuda"))  # type: ignore[arg-type]
            _check_version(torch)
            return torch
    raise BuildError("torch is not installed in this environment; install torch>=2.13 first")


def _check_version(torch: Torch) -> None:
    major, minor = (int(part) for part in torch.version.split(".")[:2])
    if (major, minor) < TARGET_TORCH:
        raise BuildError(
            f"torch {torch.version} is installed in {torch.home.parent}, but dlkernels needs "
            f"torch>={TARGET_TORCH[0]}.{TARGET_TORCH[1]}; upgrade torch and build again"
        )


def build(
    output: Path, build_dir: Path, info_name: str, version: str, sanitize: bool = False
) -> None:
    """Compiles and links everything that is out of date into `output`.

    `sanitize` builds the CPU kernels for AddressSanitizer and UndefinedBehaviorSanitizer, all but
    the AVX-512 copies.
    """
    torch = find_torch()
    toolkit = find_toolkit(torch.cuda, dict(os.environ))
    if isinstance(toolkit, str):
        print(f"dlkernels: building the CPU kernels only: {toolkit}", file=sys.stderr)
    build_dir.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    _write_build_info(build_dir / "build_info.h", version, torch, toolkit)
    ninja = _ninja_file(output, build_dir, info_name, torch, toolkit, sanitize)
    _write_if_changed(build_dir / "build.ninja", ninja)
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    command = [sys.executable, "-m", "ninja", "-C", str(build_dir), "-j", jobs]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if subprocess.run(command, env=environment).returncode != 0:
        raise BuildError("compiling the kernels failed; the compiler's message stands above")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _write_build_info(path: Path, version: str, torch: Torch, toolkit: Toolkit | str) -> None:
    has_cuda = isinstance(toolkit, Toolkit)
    values = {
        "kVersion": version,
        "kTorchVersion": torch.version,
        "kTargetTorchVersion": ".".join(map(str, TARGET_TORCH)),
        "kCpuCapabilities": " ".join(name.removeprefix("cpu_") for name in CPU_CAPABILITIES),
        "kCudaVersion": toolkit.version if has_cuda else "",
        "kCudaArchList": _arch_list() if has_cuda else "",
        "kNoCudaReason": "" if has_cuda else str(toolkit),
    }
    lines = [f'constexpr const char* {name} = R"~({value})~";' for name, value in values.items()]
    _write_if_changed(path, "#pragma once\n\n" + "\n".join(lines) + "\n")


def _arch_list() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCH_LIST


class _NinjaFile:
    """Collects build statements; paths in them are absolute."""

    def __init__(self, build_dir: Path):
        self.build_dir = build_dir
        self.lines = ["ninja_required_version = 1.5"]

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, flags: list[str], suffix: str = "") -> Path:
        stem = source.relative_to(ROOT / "csrc").with_suffix("").as_posix().replace("/", ".")
        target = self.build_dir / f"{stem}{suffix}.o"
        self._statement(rule, target, [source], flags)
        return target

    def link(self, target: Path, objects: list[Path], flags: list[str]) -> None:
        self._statement("link", target, objects, flags)

    def _statement(self, rule: str, target: Path, inputs: list[Path], flags: list[str]) -> None:
        sources = " ".join(_escape(path) for path in inputs)
        joined = " ".join(flag.replace("$", "$$") for flag in flags)
        self.lines += [f"build {_escape(target)}: {rule} {sources}", f"  flags = {joined}"]

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_file(
    output: Path,
    build_dir: Path,
    info_name: str,
    torch: Torch,
    toolkit: Toolkit | str,
    sanitize: bool,
) -> str:
    command = compiler()
    common = COMMON_FLAGS + (SANITIZED_FLAGS if sanitize else [])
    # Error messages name the file they come from: not where it lay on the machine that built it.
    stable_abi = [
        TARGET_FLAG,
        f"-isystem {torch.home}/include",
        f"-ffile-prefix-map={torch.home}=torch",
        f"-ffile-prefix-map={ROOT}=.",
    ]
    libraries = f"-L{torch.home}/lib"

    ninja = _NinjaFile(build_dir)
    ninja.rule("compile", f"{command} -MMD -MF $out.d -c $in -o $out $flags", depfile=True)
    ninja.rule("link", f"{command} -shared $in -o $out $flags")

    csrc = ROOT / "csrc"
    objects = [
        ninja.compile("compile", source, common + stable_abi)
        for source in [csrc / "ops.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]
    ]
    for source in sorted((csrc / "cpu" / "kernels").glob("*.cpp")):
        for capability, flags in CPU_CAPABILITIES.items():
            define = [f"-DDLKERNELS_CPU_CAPABILITY={capability}"]
            base = COMMON_FLAGS if capability == NOT_SANITIZED else common
            objects.append(
                ninja.compile("compile", source, base + flags + define, f".{capability}")
            )
    link_flags = SANITIZERS if sanitize else ["-s"]
    ninja.link(
        output / "libdlkernels_cpu.so", objects, [libraries, "-lc10", "-ltorch_cpu", *link_flags]
    )

    if isinstance(toolkit, Toolkit):
        _add_cuda(ninja, output, toolkit, stable_abi, libraries)
    else:
        (output / "libdlkernels_cuda.so").unlink(missing_ok=True)

    import pybind11

    info_flags = [
        *COMMON_FLAGS,
        f"-isystem {pybind11.get_include()}",
        f"-isystem {sysconfig.get_path('include')}",
        f"-I{build_dir}",
        f"-ffile-prefix-map={pybind11.get_include()}=pybind11",
        f"-ffile-prefix-map={sysconfig.get_path('include')}=python",
    ]
    info = ninja.compile("compile", csrc / "bindings.cpp", info_flags)
    ninja.link(output / info_name, [info], ["-s"])
    return ninja.text()


def _add_cuda(
    ninja: _NinjaFile, output: Path, toolkit: Toolkit, stable_abi: list[str], libraries: str
) -> None:
    host_flags = ",".join(["-fPIC", "-fvisibility=hidden", "-Wno-psabi"])
    kernel_flags = [
        *("-std=c++20", "-O3", f"-Xcompiler={host_flags}"),
        *("-Werror=all-warnings", "-Xptxas=-warn-spills", "-Xfatbin=-compress-all"),
        *gencode_flags(_arch_list()),
    ]
    cuda = ROOT / "csrc" / "cuda"
    ninja.rule("nvcc", f"{toolkit.nvcc} -MMD -MF $out.d -c $in -o $out $flags", depfile=True)
    objects = [
        ninja.compile("nvcc", source, kernel_flags)
        for source in sorted((cuda / "kernels").glob("*.cu"))
    ]
    launcher_flags = [*stable_abi, "-DUSE_CUDA", f"-isystem {toolkit.home}/include"]
    objects += [
        ninja.compile("compile", source, COMMON_FLAGS + launcher_flags)
        for source in sorted(cuda.glob("*.cpp"))
    ]
    runtime = f"-L{toolkit.home}/lib64"
    ninja.link(
        output / "libdlkernels_cuda.so",
        objects,
        [libraries, runtime, "-lc10", "-ltorch_cpu", "-ltorch_cuda", "-lcudart", "-s"],
    )


def read_version() -> str:
    """The version that dlkernels/version.py states; DLKERNELS_VARIANT adds a wheel's variant."""
    text = (ROOT / "dlkernels" / "version.py").read_text()
    match = re.search(r'__version__ = "(.+)"', text)
    if not match:
        raise BuildError("dlkernels/version.py states no __version__")
    variant = os.environ.get("DLKERNELS_VARIANT")
    return f"{match.group(1)}+{variant}" if variant else match.group(1)


def why_not_compiled() -> str | None:
    """Why an install here is pure Python; never where the compiled parts are demanded."""
    if "1" in (os.environ.get("DLKERNELS_FORCE_BUILD"), os.environ.get("DLKERNELS_CUDA")):
        return None
    command = compiler()
    if shutil.which(command.split()[0]) is None:
        return (
            f"no C++ compiler was found when dlkernels was installed (looked for {command!r}); "
            "install one, or set CXX, and install dlkernels again"
        )
    return None


def compiler() -> str:
    """The C++ compiler and what stands before it, such as ccache."""
    return os.environ.get("CXX", "c++")
