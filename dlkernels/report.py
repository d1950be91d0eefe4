"""``python -m dlkernels report``: the figures of ``bench`` as one HTML page without other files."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dlkernels.machine import machine

PACKAGE = Path(__file__).parent
CUDA_BUDGETS = PACKAGE.parent / "csrc" / "cuda" / "kernels"
HOW_TO_COUNT = "make traffic"
STYLE = """
body { font: 15px sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px }
th, td { border: 1px solid #ccc; padding: 3px 8px; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
td.missing { color: #a33 }
svg { font: 12px sans-serif; max-width: 100% }
"""
OURS, THEIRS, INK = "#2a7a4b", "#b5542f", "#222"
Row = dict[str, Any]


def page(rows: Sequence[Row], traffic: Sequence[Row] = ()) -> str:
    """The page.

    Args:
        rows: of the benchmarks, as :func:`dlkernels.bench.read_rows` gives them; each names the
            machine, versions and commit that it was measured with.
        traffic: bytes that GPU kernels move, as :func:`read_traffic` gives them.
    """
    parts = ["<h1>dlkernels: measured</h1>"]
    for where, measured in _by_machine(rows):
        parts += [f"<h2>{escape(where)}</h2>", *_sections(measured)]
    parts += ["<h2>GPU kernels: budgets of the machine code</h2>", _budgets()]
    parts += ["<h2>GPU kernels: bytes moved, counted on the CPU</h2>", _traffic(traffic)]
    written = "; ".join(f"{name}: {value}" for name, value in machine().items())
    parts.append(f"<p>Written on {escape(written)}.</p>")
    head = f"<meta charset='utf-8'><title>dlkernels: measured</title><style>{STYLE}</style>"
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _by_machine(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        where = "; ".join(f"{name}: {value}" for name, value in row.get("machine", {}).items())
        groups.setdefault(where or "unknown machine", []).append(row)
    return list(groups.items())


def _sections(rows: Sequence[Row]) -> list[str]:
    compared = [row for row in rows if "peers" in row]
    others = [row for row in rows if "peers" not in row]
    parts = []
    if compared:
        parts += ["<h3>Time over each peer</h3>", _bars(_ratios_to_peers(compared), "x the peer")]
        parts += [_table(_columns_of_peers(compared), _rows_of_peers(compared))]
        floors = [(r["benchmark"], r["ratio to floor"]) for r in compared if "ratio to floor" in r]
        if floors:
            parts += ["<h3>Time over a copy of the bytes that must move</h3>"]
            parts += [_bars(floors, "x the copy")]
        parts += _memory(compared)
    if others:
        parts += ["<h3>Other figures</h3>", *(_one_row(row) for row in others)]
    return parts


# ---- peers ---------------------------------------------------------------------------------------


def _ours(row: Row) -> tuple[str, float]:
    """The fastest of the library's calls and its milliseconds."""
    mine = {
        key.removesuffix(" ms"): value
        for key, value in row.items()
        if key.endswith(" ms") and isinstance(value, float)
        if key.removesuffix(" ms") not in (*row["peers"], "floor")
    }
    name = min(mine, key=mine.__getitem__)
    return name, mine[name]


def _ratios_to_peers(rows: Sequence[Row]) -> list[tuple[str, float | None]]:
    return [
        (f"{row['benchmark']} / {peer}", _ratio(_ours(row)[1], row.get(f"{peer} ms")))
        for row in rows
        for peer in row["peers"]
    ]


def _ratio(ours: float, theirs: object) -> float | None:
    return ours / theirs if isinstance(theirs, float) else None


def _columns_of_peers(rows: Sequence[Row]) -> list[str]:
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peers"]))
    columns = ["benchmark", "dlkernels ms (quartiles)", "floor ms"]
    return columns + [f"{peer} ms (ratio)" for peer in peers]


def _rows_of_peers(rows: Sequence[Row]) -> list[list[object]]:
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peers"]))
    return [_row_of_peers(row, peers) for row in rows]


def _row_of_peers(row: Row, peers: Sequence[str]) -> list[object]:
    name, ours = _ours(row)
    low, high = row["quartiles ms"][name]
    cells: list[object] = [row["benchmark"], f"{ours:.3g} ({low:.3g} to {high:.3g})"]
    cells.append(row.get("floor ms", ""))
    for peer in peers:
        value = row.get(f"{peer} ms", "")
        ratio = _ratio(ours, value)
        cells.append(f"{value:.3g} ({ratio:.2f})" if ratio is not None else value)
    return cells


def _memory(rows: Sequence[Row]) -> list[str]:
    weighed = [row for row in rows if any(key.endswith(" MiB") for key in row)]
    bars = [
        (f"{row['benchmark']}: {key.removesuffix(' MiB')}", row[key])
        for row in weighed
        for key in row
        if key.endswith(" MiB")
    ]
    return ["<h3>Peak memory</h3>", _bars(bars, "MiB", reference=None)] if bars else []


def _one_row(row: Row) -> str:
    values = {k: v for k, v in row.items() if k != "machine" and not isinstance(v, (dict, list))}
    return _table(list(values), [list(values.values())])


# ---- GPU -----------------------------------------------------------------------------------------


def _budgets() -> str:
    rows = [*_triton_budgets(), *_cuda_budgets()]
    columns = ["kernel", "registers at most", "shared bytes at most", "128-bit share at least"]
    text = (
        "Tests compile every kernel for sm_80, sm_90 and sm_100 and hold it to these; none spills."
    )
    return f"<p>{text}</p>" + _table(columns, rows)


def _triton_budgets() -> list[list[object]]:
    rows: list[list[object]] = []
    for path in sorted(PACKAGE.glob("*/triton.py")):
        family = path.parent.name
        try:
            budgets = importlib.import_module(f"dlkernels.{family}.triton").BUDGETS
        except ImportError as error:
            rows.append([f"{family} (Triton)", f"not shown: {error}", "", ""])
            continue
        # Some families have budgets by mode.
        modes = budgets if all(isinstance(b, dict) for b in budgets.values()) else {"": budgets}
        for mode, kernels in modes.items():
            title = f"{family} (Triton){mode and f', {mode}'}"
            rows += [
                [f"{title}: {kernel}", budget.registers, budget.shared, budget.wide or ""]
                for kernel, budget in kernels.items()
            ]
    return rows


def _cuda_budgets() -> list[list[object]]:
    paths = sorted(CUDA_BUDGETS.glob("*.budget.toml"))
    if not paths:
        return [["CUDA C++", "not shown: the budgets are part of the source tree", "", ""]]
    try:
        import tomllib
    except ImportError:
        return [["CUDA C++", "not shown: reading them needs Python 3.11", "", ""]]
    return [
        [
            f"{path.name.partition('.')[0]} (CUDA C++): {kernel}",
            budget["registers"],
            budget["shared"],
            budget.get("wide", ""),
        ]
        for path in paths
        for kernel, budget in tomllib.loads(path.read_text()).items()
    ]


def read_traffic(path: Path) -> list[Row]:
    """What the GPU proof's tests counted: a JSON object a line; the file may not be there."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _traffic(rows: Sequence[Row]) -> str:
    if not rows:
        return f"<p>Not counted yet; run <code>{escape(HOW_TO_COUNT)}</code>.</p>"
    text = "Each test holds its kernels to at most 1.1 x the bytes that must move."
    columns = ["test", "loaded bytes", "stored bytes"]
    cells = [[row[name] for name in ("test", "loaded", "stored")] for row in rows]
    return f"<p>{text}</p>" + _table(columns, cells)


# ---- HTML ----------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, (int, float)):
        text = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
        return f"<td class='number'>{text}</td>"
    kind = " class='missing'" if str(value).startswith("not ") else ""
    return f"<td{kind}>{escape(str(value))}</td>"


def _bars(
    values: Sequence[tuple[str, float | None]], unit: str, reference: float | None = 1.0
) -> str:
    """A bar a value, cut off at the 95th percentile; those that are missing say so."""
    known = sorted(value for _, value in values if value is not None)
    longest = max(known[int(0.95 * (len(known) - 1))] if known else 1.0, reference or 0.0)
    label, width, step = 420, 460, 18
    parts = []
    for index, (name, value) in enumerate(values):
        y = index * step
        parts.append(f"<text x='{label - 6}' y='{y + 13}' text-anchor='end'>{escape(name)}</text>")
        if value is None:
            parts.append(f"<text x='{label + 4}' y='{y + 13}' fill='{THEIRS}'>not installed</text>")
            continue
        length = width * min(1.0, value / longest)
        colour = OURS if reference is None or value <= reference else THEIRS
        parts.append(
            f"<rect x='{label}' y='{y + 3}' width='{length:.1f}' height='12' fill='{colour}'/>"
            f"<text x='{label + length + 4:.1f}' y='{y + 13}'>{value:.3g}</text>"
        )
    height = step * len(values) + 20
    if reference is not None:
        x = label + width * reference / longest
        parts.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{height - 20}' stroke='{INK}'/>")
    parts.append(f"<text x='{label}' y='{height - 5}'>{escape(unit)}</text>")
    size = f"width='{label + width + 70}' height='{height}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size}>{''.join(parts)}</svg>"
