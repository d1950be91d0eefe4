"""Wheels of this tree, and virtual environments to install them into."""

import os
import subprocess
import sys
import sysconfig
import venv
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


class Environment:
    """A new virtual environment that finds torch, and whatever else is installed here.

    The pip of the environment that runs the tests installs into it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        packages = next(folder.glob("lib/python*/site-packages"))
        outer = Path(sysconfig.get_path("purelib"))
        (packages / "outer.pth").write_text(f"{outer}\n")
        # Builds in isolation look for torch in the environment's own folder.
        (packages / "torch").symlink_to(outer / "torch")

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, *map(str, arguments)],
            cwd=self.folder,
            env={**without_source_tree(), **environment},
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
def new_environment(tmp_path_factory) -> Callable[[], Environment]:
    return lambda: Environment(tmp_path_factory.mktemp("venv") / "venv")


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
