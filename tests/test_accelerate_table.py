"""tools/accelerate_table.py: measuring a small model, resuming, and the page."""

import json
import subprocess
import sys
from pathlib import Path

from tools import accelerate_table

ROOT = Path(__file__).parent.parent
COMPARISON = {"name": "training: output 0", "before": 1e-6, "after": 2e-6, "limit": 1e-5}
EXACT = {
    "model": "timm/some",
    "kind": "correctness",
    "state": "partly",
    "swapped": {"SEModule": 3},
    "left": {"it has hooks": 2},
    "comparisons": [COMPARISON, {**COMPARISON, "name": "training: gradients"}],
}
TIME = {
    "model": "timm/some",
    "kind": "time",
    "batch": 2,
    "size": 32,
    "machine": "a machine",
    "seconds": {
        "dlkernels, contiguous": [0.1, 0.1, 0.2],
        "eager, contiguous": [0.3, 0.3, 0.3],
        "torch.compile, contiguous": [0.125] * 3,
        "dlkernels, channels_last": [0.3, 0.3, 0.3],
        "eager, channels_last": [0.2, 0.2, 0.2],
    },
    "peak": {
        "dlkernels, contiguous": 2**20,
        "eager, contiguous": 2**24,
        "torch.compile, contiguous": 2**21,
        "dlkernels, channels_last": 2**24,
        "eager, channels_last": 2**22,
    },
}
WHOLE = {**EXACT, "model": "timm/whole", "state": "swapped", "left": {}}
NOT_COMPILED = {
    **TIME,
    "model": "timm/whole",
    **{
        part: {k: v for k, v in TIME[part].items() if "compile" not in k}
        for part in ("seconds", "peak")
    },
}


def test_a_model_is_measured_once_and_the_page_written(tmp_path):
    lines, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- table -->\nold\n<!-- end of table -->\n\nThe end\n")
    tool = [sys.executable, ROOT / "tools" / "accelerate_table.py", "--only", "timm/test_eff.*net"]
    paths = ["--lines", lines, "--page", page, "--batch", "2", "--size", "32"]
    for options in ([], ["--time", "--rounds", "1"], []):
        result = subprocess.run([*tool, *paths, *options], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    read = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["kind"] for line in read] == ["correctness", "time"]
    assert read[0]["state"] == "swapped"
    assert read[0]["swapped"]["InvertedResidual"] == 2
    text = page.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("The end\n")
    assert "timm/test_efficientnet" in text
    assert "old" not in text


def test_tables():
    failed = {"model": "timm/bad", "kind": "correctness", "error": "it broke"}
    large = {"model": "timm/large", "kind": "correctness", "skipped": "900 million parameters"}
    text = accelerate_table.table([EXACT, WHOLE, TIME, NOT_COMPILED, failed, large])
    assert "2 models: 1 swapped, 1 partly, 0 left; 0 beyond the contract." in text
    assert (
        "| timm/some | partly | 3 SEModule | 2 (1) | 2e-06 / 1e-06 | 2e-06 / 1e-06 | 0.20 |" in text
    )
    assert "1. it has hooks" in text
    assert "Not run: timm/large (900 million parameters)." in text
    assert "Failed: timm/bad (it broke)." in text
    row = "| 200 ch | 125 co | 100 (100 to 200) co | 0.50 | 0.80 | 4 | 2 | 1 | 0.25 | 0.50 |"
    assert f"| timm/some (partly) {row}" in text
    row = "| 200 ch |  | 100 (100 to 200) co | 0.50 | 0.50 | 4 |  | 1 | 0.25 | 0.25 |"
    assert f"| timm/whole {row}" in text
    assert "of the 1 fully swapped models: 0.50 x the time and 0.25 x the memory of eager" in text
    assert "torch.compile was" not in text
    text = accelerate_table.table([WHOLE, {**TIME, "model": "timm/whole"}])
    assert "0.80 x the time of the faster of both (aim 0.70, missed)" in text
    assert "0.50 x the memory of the smaller (aim 0.60, met)" in text


def test_convolutions_alone_make_no_model_a_swapped_one():
    for swapped, left, state in (
        ({"Conv2d": 5}, {}, "left"),
        ({"Conv2d": 5}, {"it has hooks": 1}, "left"),
        ({"SEModule": 3, "Conv2d": 5}, {}, "swapped"),
        ({"SEModule": 3, "Conv2d": 5}, {"it has hooks": 1}, "partly"),
    ):
        assert accelerate_table.model_bench.Correctness(swapped, left, []).state == state


def test_a_process_that_dies_is_an_error():
    assert accelerate_table._in_a_process(lambda _: sys.exit(3), "x") == {
        "error": "the process ended with code 3"
    }


def test_the_models_of_the_families():
    names = accelerate_table.model_bench.model_names()
    assert len(names) == len(set(names)) > 150
    for name in (
        *("torchvision/densenet121", "torchvision/regnet_y_400mf", "timm/rexnet_100"),
        *("timm/resnest14d", "timm/seresnet50", "timm/mobilenetv3_rw", "timm/legacy_senet154"),
    ):
        assert name in names
    assert "timm/regnetx_002" not in names
    assert set(accelerate_table.TIMED) <= set(names)
