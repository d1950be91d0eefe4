"""The commands of ``python -m dlkernels``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from dlkernels import backend, bench, report
from dlkernels.version import __version__

BENCH = bench.OUTPUT
TRAFFIC = Path("out/gpu-traffic.jsonl")


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs the command."""
    parser = argparse.ArgumentParser(prog="dlkernels", description=__doc__)
    commands = parser.add_subparsers(required=True)
    info = commands.add_parser("info", help="what this install holds, and what serves each op")
    info.set_defaults(run=lambda _: print(info_text()))
    demo = commands.add_parser("demo", help="shows networks before and after accelerate()")
    demo.add_argument("--output", default="out/demo.png", help="where the chart goes")
    demo.set_defaults(run=_run_demo)
    _add_detect(commands)
    _add_bench(commands)
    options = parser.parse_args(arguments)
    # Of the profiler that counts memory: its log of itself would lie between the tables.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    options.run(options)


def _run_demo(options: argparse.Namespace) -> None:
    # Imported here: the demo needs packages that the library does not.
    from dlkernels.demo import run

    run(Path(options.output))


def _add_detect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    detect = commands.add_parser("detect", help="draws the objects in images, and prints JSON")
    detect.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    detect.add_argument("--model", help="the detector's name; by default the checkpoint's")
    detect.add_argument("--weights", type=Path, required=True, help="a checkpoint, or .weights")
    detect.add_argument("--cfg", type=Path, help="Darknet's, of the network of .weights")
    detect.add_argument("--names", type=Path, help="file with the name of a class on each line")
    detect.add_argument("--output", type=Path, default=Path("out"), help="folder of the PNGs")
    detect.add_argument("--threshold", type=float, default=0.3, help="least score")
    detect.set_defaults(run=_run_detect)


def _run_detect(options: argparse.Namespace) -> None:
    # Imported here: it needs torchvision, which the library does not.
    from dlkernels.models.detection.pictures import detect_files, loaded

    try:
        detector, classes = loaded(options.model, options.weights, options.cfg, options.names)
        print(detect_files(options.images, detector, classes, options.output, options.threshold))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    timing = commands.add_parser("bench", help="times a family, a model or all beside their peers")
    timing.add_argument("name", nargs="?", help="a family, or a model of torchvision or timm")
    timing.add_argument("--output", type=Path, default=BENCH, help="JSON that rows are added to")
    timing.add_argument("--batch", type=int, help="images, for models")
    timing.add_argument("--size", type=int, help="pixels a side, for models")
    timing.add_argument("--eager-only", action="store_true", help="models without torch.compile")
    timing.set_defaults(run=_run_bench)
    page = commands.add_parser("report", help="writes the figures of bench as one HTML page")
    page.add_argument("--bench", type=Path, default=BENCH, help="what bench wrote")
    page.add_argument("--traffic", type=Path, default=TRAFFIC, help="what the GPU proof counted")
    page.add_argument("--output", type=Path, default=Path("out/report.html"))
    page.set_defaults(run=_run_report)


def _run_bench(options: argparse.Namespace) -> None:
    arguments = ["--eager-only"] if options.eager_only else []
    for name in ("batch", "size"):
        if getattr(options, name) is not None:
            arguments += [f"--{name}", str(getattr(options, name))]
    try:
        code = bench.run(options.name, options.output, arguments)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    if code:
        raise SystemExit(code)


def _run_report(options: argparse.Namespace) -> None:
    rows = bench.read_rows(options.bench)
    if not rows:
        raise SystemExit(f"error: {options.bench} has no figures; run python -m dlkernels bench")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report.page(rows, report.read_traffic(options.traffic)))
    print(f"the report is in {options.output}")


def info_text() -> str:
    """Versions, what the build holds, and for each op which backend is available or why not."""
    version = backend.info.version if backend.info else __version__
    lines = [f"dlkernels {version}, torch {torch.__version__}"]
    if backend.info is None:
        lines.append("compiled parts: none (pure Python install)")
    else:
        built = backend.info
        lines.append(f"compiled for torch {built.torch_version}, CPU: {built.cpu_capabilities}")
        if not backend.INTERPRETED:
            lines.append(f"CPU kernels in use: {torch.ops.dlkernels.cpu_capability()}")
        cuda = f"{built.cuda_version} ({built.cuda_arch_list})" if built.cuda_version else "none"
        lines.append(f"CUDA: {cuda} {built.no_cuda_reason}".rstrip())
    for op, backends in backend.availability().items():
        lines.append(f"\n{op}")
        lines += [f"  {name:<10}{state}" for name, state in backends.items()]
    return "\n".join(lines)
