"""Runs the tests of all ops under another torch than the one that built the wheel.

``python tools/test_other_torch.py 2.13.0`` builds the CPU wheel here, makes a virtual environment
with that torch, installs the wheel into it, and runs the tests from outside the source tree.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from build_wheel import ROOT, build_wheel
from variants import VARIANTS

# Tests of the ops themselves; what surrounds them needs timm too.
TESTS = ["test_numbers.py", "test_op.py", "test_bad_input.py"]
# Each torchvision pins the torch that it was built for, so that pip picks the one that fits.
REQUIREMENTS = ["torchvision", "numpy", "pytest", "hypothesis"]

# torchvision's kernels do not load where it was built for CUDA and torch was not. Its formulas in
# Python, all that the tests use of it, do once the ops exist that it describes in any case.
WITHOUT_VISION_KERNELS = """
import torch

for name in ("nms", "qnms"):
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    torch.library.define(f"torchvision::{name}", schema)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("torch", help="its version")
    arguments = parser.parse_args()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build_wheel(VARIANTS["cpu"], folder, ROOT / "build" / "wheel-cpu")
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        install = [python, "-m", "pip", "install", "-q", f"torch=={arguments.torch}", *REQUIREMENTS]
        subprocess.run([*install, wheel], cwd=folder, env=environment, check=True)
        shutil.copytree(ROOT / "tests", folder / "tests")
        tests = sorted(
            str(path.relative_to(folder))
            for test in TESTS
            for path in (folder / "tests").glob(f"*/{test}")
        )
        command = [python, "-m", "pytest", "-q", *tests]
        imported = [python, "-c", "import torchvision"]
        if subprocess.run(imported, cwd=folder, env=environment, capture_output=True).returncode:
            (folder / "without_vision_kernels.py").write_text(WITHOUT_VISION_KERNELS)
            command += ["-p", "without_vision_kernels"]
        raise SystemExit(subprocess.run(command, cwd=folder, env=environment).returncode)


if __name__ == "__main__":
    main()
