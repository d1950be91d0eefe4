"""Packaging: setuptools for Python, tools/native_build.py for the compiled parts."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

import native_build
from cuda_toolkit import CudaError


class NativeBuildExt(build_ext):
    """Hands the one extension, dlkernels._info, and the libraries beside it to ninja."""

    def run(self):
        info = Path(self.get_ext_fullpath("dlkernels._info"))
        try:
            native_build.build(
                output=info.parent.resolve(),
                build_dir=Path(self.build_temp).resolve(),
                info_name=info.name,
                version=native_build.read_version(),
            )
        except (native_build.BuildError, CudaError) as error:
            raise SystemExit(f"dlkernels: {error}") from None

    def get_outputs(self):
        folder = Path(self.get_ext_fullpath("dlkernels._info")).parent
        return [str(path) for path in sorted(folder.glob("*.so"))]


class PureBuild(build_py):
    """Leaves the reason in the package why it holds no compiled parts."""

    def run(self):
        super().run()
        self.note().write_text(f'"""Written by the install."""\n\nREASON = {NOT_COMPILED!r}\n')

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), str(self.note())]

    def note(self):
        return Path(self.build_lib) / "dlkernels" / "_not_compiled.py"


NOT_COMPILED = native_build.why_not_compiled()

if NOT_COMPILED:
    print(f"dlkernels: a pure Python install: {NOT_COMPILED}", file=sys.stderr)
    setup(version=native_build.read_version(), cmdclass={"build_py": PureBuild})
else:
    setup(
        version=native_build.read_version(),
        ext_modules=[Extension("dlkernels._info", sources=["csrc/bindings.cpp"])],
        cmdclass={"build_ext": NativeBuildExt},
    )
