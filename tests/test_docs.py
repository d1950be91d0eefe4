"""The documentation builds without a warning, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path

from dlkernels import nn, ops
from tools import wheel_table
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


def test_the_table_of_wheels_fits_the_recipes():
    text = (ROOT / "docs" / "install.md").read_text()
    table = text.split(wheel_table.BEGIN)[1].split(wheel_table.END)[0].strip().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert head == wheel_table.HEAD
    shown = {row[0].strip("`").split("+")[1]: dict(zip(head, row, strict=True)) for row in rows}
    assert {"cpu", "cu130"} <= set(shown) <= set(VARIANTS)
    for name, row in shown.items():
        assert row["GPUs"] == (VARIANTS[name].arch_list.replace(";", " ") or "none")


def test_the_snippets_of_the_readme_run():
    snippets = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        # The comparison in float64 takes long; tests/accelerate has it on smaller models.
        exec(snippet.replace(", example_input=images", ""), {})
