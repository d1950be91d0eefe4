"""The workflow builds every wheel, and runs nothing that the Makefile does not have."""

import re
from itertools import product
from pathlib import Path

import pytest
import tomllib
import yaml

from tools.variants import VARIANTS

ROOT = Path(__file__).parent.parent
PYTHONS = ["cp310", "cp311", "cp312", "cp313", "cp314"]


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())


def expanded(matrix: dict) -> list[dict]:
    """The jobs of a matrix, by GitHub's rule.

    A row of ``include`` adds to the combinations whose own values it does not change.
    """
    axes = {name: values for name, values in matrix.items() if name != "include"}
    jobs = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    for row in matrix.get("include", []):
        fitting = [job for job in jobs if all(job.get(k, v) == v for k, v in row.items())]
        assert fitting, f"{row} would be a job of its own"
        for job in fitting:
            job.update(row)
    return jobs


def test_it_names_targets_that_exist(workflow):
    runs = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    named = {target for run in runs for target in re.findall(r"\bmake ([\w-]+)", run)}
    defined = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"test", "sanitize", "test-torch", "gpu"} <= named <= defined


def test_every_cuda_wheel_is_built_for_every_python(workflow):
    jobs = expanded(workflow["jobs"]["cuda"]["strategy"]["matrix"])
    built = [(job["python"].split("-")[0], job["variant"], job["cuda"]) for job in jobs]
    for_cuda = [variant for variant in VARIANTS.values() if variant.cuda]
    assert sorted(built) == sorted((p, v.name, v.cuda) for p, v in product(PYTHONS, for_cuda))


def test_the_cpu_wheel_is_built_for_every_python_on_both_processors(workflow):
    job = workflow["jobs"]["cpu"]
    assert {"ubuntu-24.04", "ubuntu-24.04-arm"} == set(job["strategy"]["matrix"]["runner"])
    assert any("pypa/cibuildwheel@" in step.get("uses", "") for step in job["steps"])
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert settings["build"] == [f"{python}-manylinux_*" for python in PYTHONS]
    assert settings["archs"] == ["auto64"]
    assert settings["environment"]["DLKERNELS_VARIANT"] == "cpu"
    for name in ("libtorch*.so", "libc10*.so", "libgomp.so.*"):
        assert f"--exclude {name}" in settings["repair-wheel-command"]


def test_what_needs_a_gpu_starts_by_hand_only(workflow):
    on_gpu = {name for name, job in workflow["jobs"].items() if "gpu" in job["runs-on"]}
    assert on_gpu == {"gpu"}
    assert workflow["jobs"]["gpu"]["if"] == "github.event_name == 'workflow_dispatch'"
