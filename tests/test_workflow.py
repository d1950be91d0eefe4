"""The workflow parses and runs nothing that the Makefile does not have."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def test_it_names_targets_that_exist():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    runs = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    named = {target for run in runs for target in re.findall(r"\bmake ([\w-]+)", run)}
    defined = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"test", "sanitize", "test-torch", "gpu"} <= named <= defined
