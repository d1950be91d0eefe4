"""Wheels of this tree, and virtual environments to install them into."""

import ensurepip
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tools"))

from build_wheel import build_wheel, environment_for
from cuda_toolkit import CudaError
from variants import VARIANTS

ROOT = Path(__file__).parent.parent.parent


def possible_variants() -> list[str]:
    """The variants that this machine's torch and toolkit can build."""
    possible = []
    for name, variant in VARIANTS.items():
        try:
            environment_for(variant)
        except CudaError:
            continue
        possible.append(name)
    return possible


def without_source_tree() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def pip_of_python() -> Path:
    """The pip that every new virtual environment of this Python starts with, as a wheel."""
    bundled = sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    if not bundled:
        pytest.skip("this Python brings no pip")
    return bundled[-1]


def repack(name: str, folder: Path) -> None:
    """Makes a wheel of an installed package, so that builds in isolation need no network."""
    package = importlib.metadata.distribution(name)
    tag = (package.read_text("WHEEL") or "").split("Tag: ")[1].split()[0]
    generated = {entry.name for entry in package.entry_points.select(group="console_scripts")}
    with zipfile.ZipFile(folder / f"{name}-{package.version}-{tag}.whl", "w") as wheel:
        for file in package.files or []:
            is_script = file.parts[0] == ".."
            scripts = f"{name}-{package.version}.data/scripts"
            if file.suffix != ".pyc" and not (is_script and file.name in generated):
                stored = f"{scripts}/{file.name}" if is_script else str(file)
                wheel.write(package.locate_file(file), stored)


class Environment:
    """A new virtual environment with the torch that is installed here.

    Args:
        folder: where it goes.
        packages: a folder of wheels, all that pip may install from: tests ask no network.
        isolated: brings torch alone, and the pip that comes with Python. Otherwise it finds
            whatever else is installed here too, pip included.
    """

    def __init__(self, folder: Path, packages: Path, isolated: bool = False):
        self.folder = folder
        self.pip_settings = {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(packages),
        }
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.packages = next(folder.glob("lib/python*/site-packages"))
        outer = Path(sysconfig.get_path("purelib"))
        if isolated:
            zipfile.ZipFile(pip_of_python()).extractall(self.packages)
        else:
            (self.packages / "outer.pth").write_text(f"{outer}\n")
        # Builds in isolation look for torch in the environment's own folder.
        (self.packages / "torch").symlink_to(outer / "torch")

    def replace_torch(self, version: str | None) -> None:
        """Puts in torch's place a folder that says this version, or nothing."""
        (self.packages / "torch").unlink()
        if version is not None:
            (self.packages / "torch").mkdir()
            text = f"__version__ = {version!r}\ncuda = None\n"
            (self.packages / "torch" / "version.py").write_text(text)

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, *map(str, arguments)],
            cwd=self.folder,
            env={**without_source_tree(), **self.pip_settings, **environment},
            capture_output=True,
            text=True,
        )

    def try_to_install(
        self, *arguments: object, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pip", "install", "--no-deps", *arguments, **environment)

    def install(self, *arguments: object, **environment: str) -> None:
        result = self.try_to_install(*arguments, **environment)
        assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Callable[[str], Path]:
    """Gives the wheel of a variant; each is built once."""

    @cache
    def build(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        # The architectures and the folder of the build in the tree: nothing is compiled twice.
        return build_wheel(VARIANTS[name], folder, ROOT / "build", "8.0;9.0;10.0+PTX")

    return build


@pytest.fixture(scope="session")
def build_requirements(tmp_path_factory) -> Path:
    """A folder with wheels of what a build in isolation needs."""
    folder = tmp_path_factory.mktemp("packages")
    for name in ("setuptools", "ninja", "pybind11"):
        repack(name, folder)
    return folder


@pytest.fixture(scope="session")
def new_environment(tmp_path_factory, build_requirements) -> Callable[..., Environment]:
    def new(isolated: bool = False) -> Environment:
        return Environment(tmp_path_factory.mktemp("venv") / "venv", build_requirements, isolated)

    return new


@pytest.fixture(scope="session", params=possible_variants())
def wheel(request, built) -> Path:
    return built(request.param)


@pytest.fixture(scope="session")
def installed(wheel, new_environment) -> Environment:
    """An environment that holds the wheel."""
    environment = new_environment()
    environment.install(wheel)
    return environment


@pytest.fixture
def environment(new_environment) -> Environment:
    return new_environment()


@pytest.fixture
def isolated_environment(new_environment) -> Environment:
    return new_environment(isolated=True)
