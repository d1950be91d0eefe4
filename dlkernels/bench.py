"""``python -m dlkernels bench``: the benchmarks of a family or a model, and their figures as JSON.

It runs pytest on the folder ``benchmarks`` of the source tree, which is what measures; wheels do
not hold it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "benchmarks"
OUTPUT = Path("out/bench.json")

Row = dict[str, Any]


def selection(name: str | None, folder: Path = FOLDER) -> list[str]:
    """What pytest is to run for a family's or a model's name, or for all.

    Args:
        name: a family, ``models`` or ``detectors``, a model of torchvision or timm; None for all.
        folder: of the benchmarks.

    Raises:
        FileNotFoundError: the folder is not there.
        ValueError: the name is of neither a family nor a model.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the benchmarks are part of the source tree, not of a wheel, and {folder} is not "
            "there; run this command in a checkout of dlkernels"
        )
    if name is None:
        return [str(folder)]
    if (folder / f"bench_{name}.py").is_file():
        return [str(folder / f"bench_{name}.py")]
    families = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    from dlkernels.model_bench import full_name

    try:
        return [str(folder / "bench_models.py"), "--model", full_name(name)]
    except ImportError as error:
        raise ValueError(f"{name!r} is none of {', '.join(families)}, and {error}") from error
    except ValueError as error:
        raise ValueError(f"{error}, nor one of {', '.join(families)}") from error


def run(name: str | None, output: Path, options: Sequence[str] = ()) -> int:
    """Runs benchmarks and adds their rows to the file; returns pytest's exit status.

    Args:
        name: see :func:`selection`.
        output: JSON, a list of rows; one of the same benchmark is replaced.
        options: more for pytest.

    Raises:
        FileNotFoundError: see :func:`selection`.
        ValueError: see there.
    """
    chosen = selection(name)
    command = [sys.executable, "-m", "pytest", *chosen, "--benchmark-only", "-q"]
    output = output.absolute()
    return subprocess.call([*command, "--rows", str(output), *options], cwd=FOLDER.parent)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that may not be there yet."""
    rows: list[Row] = json.loads(path.read_text()) if path.is_file() else []
    return rows


def add_rows(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to the file; a row replaces an older one of the same benchmark."""
    kept = {row["benchmark"]: row for row in (*read_rows(path), *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(kept.values()), indent=1))
