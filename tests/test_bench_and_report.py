"""The bench and report commands: one source of figures, and a page without other files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import MISSING, row_of
from dlkernels import bench, cli, report
from dlkernels.measure import Timing, interleaved_timings

ROOT = Path(__file__).parent.parent
MACHINE = {"processor": "a <fast> one", "torch": "2.0", "commit": "abc123"}
TIMINGS = {
    "dlkernels": Timing(0.002, 0.001, 0.003),
    "eager": Timing(0.004, 0.004, 0.004),
    "floor": Timing(0.001, 0.001, 0.001),
}


def faked_row(name="op-1"):
    calls = ["dlkernels", "eager", "onnxruntime", "floor"]
    return {**row_of(name, calls, TIMINGS, {"dlkernels": 3.5}), "machine": MACHINE}


def test_quartiles():
    assert Timing.of([5.0]) == Timing(5.0, 5.0, 5.0)
    assert Timing.of([1, 2, 3, 4, 100]) == Timing(3, 2, 4)
    assert set(interleaved_timings({"a": lambda: 1, "b": lambda: 2}, rounds=2)) == {"a", "b"}


def test_a_row_shows_missing_peers_ratios_and_spread():
    row = faked_row()
    assert row["onnxruntime ms"] == MISSING
    assert row["peers"] == ["eager", "onnxruntime"]
    assert row["best peer"] == "eager"
    assert row["ratio to best"] == 0.5
    assert row["ratio to floor"] == 2.0
    assert row["spread"] == 1.0
    alone = row_of("alone", ["dlkernels", "peer"], {"dlkernels": TIMINGS["dlkernels"]}, {})
    assert (alone["best peer"], alone["peer ms"]) == ("", MISSING)


def test_rows_replace_older_ones(tmp_path):
    path = tmp_path / "out" / "bench.json"
    assert bench.read_rows(path) == []
    bench.add_rows(path, [faked_row("a"), faked_row("b")])
    bench.add_rows(path, [{**faked_row("a"), "ratio to best": 0.1}])
    assert [(r["benchmark"], r["ratio to best"]) for r in bench.read_rows(path)] == [
        ("a", 0.1),
        ("b", 0.5),
    ]


def test_what_bench_runs(tmp_path):
    folder = str(bench.FOLDER)
    assert bench.selection(None) == [folder]
    assert bench.selection("asff") == [f"{folder}/bench_asff.py"]
    models = [f"{folder}/bench_models.py", "--model"]
    assert bench.selection("densenet121") == [*models, "torchvision/densenet121"]
    assert bench.selection("timm/densenet121") == [*models, "timm/densenet121"]
    with pytest.raises(ValueError, match="'nothing' is no model of torchvision or timm, nor one"):
        bench.selection("nothing")
    with pytest.raises(FileNotFoundError, match="not of a wheel"):
        bench.selection(None, tmp_path / "missing")
    with pytest.raises(SystemExit, match="error: 'nothing' is no model"):
        cli.main(["bench", "nothing"])


def test_bench_prints_and_writes_the_same_figures(tmp_path):
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "dlkernels", "bench", "timm/test_efficientnet"]
    options = ["--batch", "2", "--size", "32", "--eager-only", "--output", path]
    # pytest-benchmark does not measure in a worker of pytest-xdist, which this one is not.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(path.read_text())
    assert len(rows) == 4
    for row in rows:
        (line,) = (x for x in result.stdout.splitlines() if x.startswith(row["benchmark"]))
        for name in ("dlkernels ms", "eager ms", "ratio to best"):
            assert f"{row[name]:.2f}" in line
        assert row["machine"]["torch"]


def test_the_page_is_whole_and_self_contained():
    other = {"benchmark": "assignment", "published ms": 7.0, "machine": MACHINE}
    traffic = [{"test": "test_traffic[relu]", "loaded": 1024, "stored": 512}]
    html = report.page([faked_row(), other], traffic)
    for text in ("a &lt;fast&gt; one", "abc123", "op-1 / eager", "0.50", "not installed", "1,024"):
        assert text in html
    assert html.count("<svg") == 3
    assert "scale_maps_kernel" in html  # budgets of Triton and CUDA C++
    assert "sum_rows_kernel" in html
    assert not re.search(r"(src|href)=|@import|url\(", html)
    assert html.count("<table>") == html.count("</table>") == 4


def test_report_command(tmp_path, capsys):
    path = tmp_path / "bench.json"
    with pytest.raises(SystemExit, match="no figures; run python -m dlkernels bench"):
        cli.main(["report", "--bench", str(path)])
    bench.add_rows(path, [faked_row()])
    output = tmp_path / "sub" / "report.html"
    cli.main(["report", "--bench", str(path), "--output", str(output), "--traffic", "missing"])
    assert str(output) in capsys.readouterr().out
    assert "make traffic" in output.read_text()
