"""Writes the table of docs/install.md from the wheels themselves: ``python tools/wheel_table.py``.

What a wheel needs is read from its own metadata and from the module dlkernels._info inside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- wheels: begin -->", "<!-- wheels: end -->"
HEAD = ["wheel", "size", "Python", "platform", "torch", "CUDA of torch", "GPUs", "CPU kernels"]


def row(path: Path) -> list[str]:
    """The table's row for a wheel."""
    with zipfile.ZipFile(path) as wheel:
        metadata_name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(metadata_name).decode())
        info = _info(wheel)
    torch = next(r for r in metadata.get_all("Requires-Dist", []) if r.startswith("torch"))
    python, _, platform = path.stem.split("-")[-3:]
    major = info["cuda_version"].split(".")[0]
    return [
        f"`{metadata['Version']}`",
        f"{path.stat().st_size / 2**20:.1f} MiB",
        f"{python[2]}.{python[3:]}",
        platform,
        torch.removeprefix("torch"),
        f"{major}.x" if major else "any, or none",
        info["cuda_arch_list"].replace(";", " ") or "none",
        info["cpu_capabilities"],
    ]


def _info(wheel: zipfile.ZipFile) -> dict[str, str]:
    """What the wheel's module dlkernels._info holds, read by a Python of its own."""
    name = next(n for n in wheel.namelist() if n.startswith("dlkernels/_info."))
    code = "import _info, json; print(json.dumps({k: str(v) for k, v in vars(_info).items()}))"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(wheel.extract(name, folder))
        command = [sys.executable, "-c", code]
        printed = subprocess.run(command, cwd=path.parent, capture_output=True, check=True).stdout
    return dict(json.loads(printed))


def table(wheels: list[Path]) -> str:
    """The Markdown table of the wheels."""
    rows = [HEAD, ["---"] * len(HEAD), *(row(path) for path in wheels)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    wheels = sorted(arguments.wheels.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"no wheels in {arguments.wheels}; run `make wheels` first")
    page = ROOT / "docs" / "install.md"
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{table(wheels)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
