"""The documentation builds without a warning, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from dlkernels import nn, ops
from tools.variants import VARIANTS

ROOT = Path(__file__).parent.parent


def test_pages_build_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    functions = (tmp_path / "api" / "ops" / "index.html").read_text()
    modules = (tmp_path / "api" / "nn" / "index.html").read_text()
    assert all(name in functions for name in ops.__all__)
    assert all(name in modules for name in nn.__all__)


FILE = re.compile(r"`((?:dlkernels|csrc|tests|tools|docs|benchmarks)/[\w./-]+)`")


def test_readme_and_guides_name_files_that_exist():
    for page in ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/install.md"):
        text = (ROOT / page).read_text()
        for name in FILE.findall(text):
            assert (ROOT / name).exists(), f"{page} names {name}"


def test_the_workflow_builds_every_variant():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    built = {row["variant"] for row in workflow["jobs"]["cuda"]["strategy"]["matrix"]["include"]}
    assert built | {"cpu"} == set(VARIANTS)
    for row in workflow["jobs"]["cuda"]["strategy"]["matrix"]["include"]:
        assert row["cuda"] == VARIANTS[row["variant"]].cuda
