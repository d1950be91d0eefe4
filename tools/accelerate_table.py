"""The table of docs/accelerate.md: what accelerate() does to torchvision's and timm's models.

    python tools/accelerate_table.py                 correctness of all models of the families
    python tools/accelerate_table.py --time          time and memory of a training step of some
    python tools/accelerate_table.py --only 'timm/rexnet.*' --fresh

Each model has a process of its own, and a JSON line in docs/figures/accelerate.jsonl; models that
have one already are skipped, so that a run can be stopped and resumed. The page is written at the
end, from all lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from dlkernels import model_bench  # noqa: E402
from dlkernels.machine import cpu_name  # noqa: E402

PAGE = ROOT / "docs" / "accelerate.md"
LINES = ROOT / "docs" / "figures" / "accelerate.jsonl"
START, END = "<!-- table -->", "<!-- end of table -->"
TIMED = [
    "torchvision/efficientnet_b0",
    "torchvision/efficientnet_v2_s",
    "torchvision/mobilenet_v2",
    "torchvision/mobilenet_v3_large",
    "torchvision/mnasnet1_0",
    "torchvision/densenet121",
    "torchvision/regnet_y_800mf",
    "timm/efficientnet_b0",
    "timm/tf_efficientnet_b0",
    "timm/mobilenetv3_large_100",
    "timm/densenet121",
    "timm/seresnet50",
    "timm/legacy_seresnet50",
    "timm/regnety_008",
    "timm/rexnet_100",
    "timm/resnest26d",
]


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    kind = "time" if options.time else "correctness"
    names = TIMED if options.time and not options.only else model_bench.model_names()
    names = [name for name in names if re.fullmatch(options.only or ".*", name)]
    lines = _read(options.lines)
    if options.fresh:
        lines = [line for line in lines if (line["kind"], line["model"] in names) != (kind, True)]
        options.lines.write_text("".join(json.dumps(line) + "\n" for line in lines))
    have = {line["model"] for line in lines if line["kind"] == kind}
    failures = 0
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(kind, total=len(names))
        for name in names:
            progress.update(task, description=name)
            if name not in have:
                line = {"model": name, "kind": kind, **_in_a_process(_job(options), name)}
                failures += "error" in line
                with options.lines.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            progress.advance(task)
    if options.page.exists():
        _write(options.page, _read(options.lines))
    return 1 if failures else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="a regular expression that model names match")
    parser.add_argument("--time", action="store_true", help="time and memory, on an idle machine")
    parser.add_argument("--compile", action="store_true", help="with --time: torch.compile, too")
    parser.add_argument("--fresh", action="store_true", help="measure again what has a line")
    parser.add_argument("--batch", type=int, help="images; 4 by default, 8 with --time")
    parser.add_argument("--size", type=int, help="pixels a side; 64 by default, 224 with --time")
    parser.add_argument("--rounds", type=int, default=5, help="of a timing")
    parser.add_argument("--millions", type=int, default=70, help="of parameters at most")
    parser.add_argument("--lines", type=Path, default=LINES)
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser.parse_args(arguments)


# ---- measuring -----------------------------------------------------------------------------------


def _job(options: argparse.Namespace) -> Callable[[str], dict]:
    batch = options.batch or (8 if options.time else 4)
    size = options.size or (224 if options.time else 64)

    def correctness(name: str) -> dict:
        result = model_bench.correctness(name, batch, size)
        return {**dataclasses.asdict(result), "state": result.state}

    def time(name: str) -> dict:
        result = model_bench.cost(name, batch, size, options.rounds, options.compile)
        threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        return {**dataclasses.asdict(result), "machine": f"{cpu_name()}, {threads}"}

    def job(name: str) -> dict:
        common = {"batch": batch, "size": size}
        millions = _parameters(name) / 1e6
        if millions > options.millions:
            return {**common, "skipped": f"{millions:.0f} million parameters"}
        return {**common, **(time if options.time else correctness)(name)}

    return job


def _parameters(name: str) -> int:
    try:
        with torch.device("meta"):
            model = model_bench.make_model(name)
    except NotImplementedError:  # some models compute their sizes with tensors
        model = model_bench.make_model(name)
    return sum(p.numel() for p in model.parameters())


def _in_a_process(job: Callable[[str], dict], name: str) -> dict:
    """The result of a forked process; the error, if it raises or is killed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(job, name, sender), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return {"error": f"the process ended with code {process.exitcode}"}
    finally:
        process.join()


def _send(job: Callable[[str], dict], name: str, sender: multiprocessing.connection.Connection):
    try:
        sender.send(job(name))
    except Exception as error:
        traceback.print_exc()
        sender.send({"error": f"{type(error).__name__}: {error}"})


# ---- the page ------------------------------------------------------------------------------------


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _write(page: Path, lines: list[dict]) -> None:
    before, _, rest = page.read_text().partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n{table(lines)}\n{END}{after}")


def table(lines: list[dict]) -> str:
    """The page's tables, in Markdown."""
    exact = [line for line in lines if line["kind"] == "correctness"]
    times = [line for line in lines if line["kind"] == "time"]
    parts = []
    if times:
        swapped = {line["model"] for line in exact if line.get("state") == "swapped"}
        parts.append(_time_table(times, swapped))
    if exact:
        parts.append(_correctness_table(exact))
    return "\n\n".join(parts)


def _correctness_table(lines: list[dict]) -> str:
    measured = [line for line in lines if "state" in line]
    notes: dict[str, int] = {}
    rows = [_correctness_row(line, notes) for line in sorted(measured, key=_order)]
    counts = {state: sum(line["state"] == state for line in measured) for state in STATES}
    beyond = sum(not _within(line) for line in measured)
    summary = f"{len(measured)} models: " + ", ".join(f"{n} {s}" for s, n in counts.items())
    summary += f"; {beyond} beyond the contract."
    columns = ["model", "", "modules swapped", "left", "output", "gradients", "of the limit"]
    legend = "\n".join(f"{number}. {reason}" for reason, number in notes.items())
    skipped = [f"{x['model']} ({x['skipped']})" for x in lines if "skipped" in x]
    failed = [f"{x['model']} ({x['error']})" for x in lines if "error" in x]
    rest = [f"Not run: {', '.join(skipped)}."] if skipped else []
    rest += [f"Failed: {', '.join(failed)}."] if failed else []
    return "\n\n".join(
        [summary, _markdown(columns, rows), f"Why modules are left:\n\n{legend}", *rest]
    )


STATES = ("swapped", "partly", "left")


def _order(line: dict) -> tuple[int, str]:
    return STATES.index(line["state"]), line["model"]


def _within(line: dict) -> bool:
    return all(c["after"] <= c["limit"] for c in line["comparisons"])


def _correctness_row(line: dict, notes: dict[str, int]) -> list[str]:
    swapped = ", ".join(f"{n} {kind}" for kind, n in line["swapped"].items())
    left = []
    for reason, count in line["left"].items():
        number = notes.setdefault(reason, len(notes) + 1)
        left.append(f"{count} ({number})")
    output = _largest(line, "output")
    gradients = _largest(line, "gradients")
    share = max(c["after"] / c["limit"] for c in line["comparisons"])
    return [
        line["model"],
        line["state"],
        swapped,
        ", ".join(left),
        output,
        gradients,
        f"{share:.2f}",
    ]


def _largest(line: dict, word: str) -> str:
    """The largest error of the accelerated model, and that of the original."""
    whole = [c for c in line["comparisons"] if word in c["name"] and " of " not in c["name"]]
    worst = max(whole, key=lambda c: c["after"])
    return f"{worst['after']:.0e} / {worst['before']:.0e}"


@dataclasses.dataclass(frozen=True)
class _Cost:
    """The time and memory of one row, each call in its faster layout.

    Attributes:
        seconds: median and quartiles by call.
        peak: bytes by call.
        layout: the first letter of the faster layout by call.
    """

    seconds: dict[str, list[float]]
    peak: dict[str, int]
    layout: dict[str, str]

    @classmethod
    def of(cls, line: dict) -> _Cost:
        fastest: dict[str, str] = {}
        for key, (median, _, _) in line["seconds"].items():
            call = key.partition(", ")[0]
            if call not in fastest or median < line["seconds"][fastest[call]][0]:
                fastest[call] = key
        return cls(
            {call: line["seconds"][key] for call, key in fastest.items()},
            {call: line["peak"][key] for call, key in fastest.items()},
            {call: key.partition(", ")[2][:2] for call, key in fastest.items()},
        )

    def ratios(self) -> list[float]:
        """Of time and of memory: to eager's, and to the least of eager's and torch.compile's."""
        return [
            ours / theirs
            for values in ({k: v[0] for k, v in self.seconds.items()}, self.peak)
            for ours in [values["dlkernels"]]
            for theirs in (
                values["eager"],
                min(value for call, value in values.items() if call != "dlkernels"),
            )
        ]

    def cells(self) -> list[str]:
        times, peaks = [], []
        for call in ("eager", "torch.compile", "dlkernels"):
            if call not in self.seconds:
                times.append("")
                peaks.append("")
                continue
            median, low, high = (1e3 * value for value in self.seconds[call])
            spread = f" ({low:.0f} to {high:.0f})" if call == "dlkernels" else ""
            times.append(f"{median:.0f}{spread} {self.layout[call]}")
            peaks.append(f"{self.peak[call] / 2**20:.0f}")
        ratios = [f"{ratio:.2f}" for ratio in self.ratios()]
        return [*times, *ratios[:2], *peaks, *ratios[2:]]


COLUMNS = ["model", "eager ms", "torch.compile ms", "dlkernels ms", "ratio to eager"]
COLUMNS += ["ratio to best", "eager MiB", "torch.compile MiB", "dlkernels MiB", "ratio to eager"]
COLUMNS += ["ratio to least"]


def _time_table(lines: list[dict], swapped: set[str]) -> str:
    """The costs of training steps.

    Args:
        lines: of kind ``"time"``.
        swapped: the models that were fully swapped.
    """
    measured = sorted((line for line in lines if "seconds" in line), key=lambda x: x["model"])
    costs = {line["model"]: _Cost.of(line) for line in measured}
    rows = [
        [name if name in swapped else f"{name} (partly)", *cost.cells()]
        for name, cost in costs.items()
    ]
    whole = [cost for name, cost in costs.items() if name in swapped]
    compiled = [cost for cost in whole if "torch.compile" in cost.seconds]
    texts = []
    if whole:
        time, _, memory, _ = _means(whole)
        texts.append(
            f"Geometric means of the {len(whole)} fully swapped models: {time:.2f} x the time and "
            f"{memory:.2f} x the memory of eager PyTorch."
        )
    if compiled:
        _, time, _, memory = _means(compiled)
        texts.append(
            f"Of the {len(compiled)} of them for which torch.compile was measured, too: {time:.2f} "
            f"x the time of the faster of both ({_verdict(time, 0.7)}) and {memory:.2f} x the "
            f"memory of the smaller ({_verdict(memory, 0.6)})."
        )
    conditions = dict.fromkeys(
        f"{line['machine']}, batch {line['batch']}, {line['size']} px"
        for line in lines
        if "machine" in line
    )
    text = "A training step, medians of interleaved runs (quartiles), float32: "
    text += f"{'; '.join(conditions)}. Each in its faster layout, contiguous (co) or channels_last "
    text += "(ch), torch.compile in channels_last; memory is the peak beyond what is held before."
    failed = [f"{x['model']} ({x['error']})" for x in lines if "error" in x]
    rest = [f"Failed: {', '.join(failed)}."] if failed else []
    return "\n\n".join([*texts, text, _markdown(COLUMNS, rows), *rest])


def _means(costs: list[_Cost]) -> list[float]:
    """The geometric means of the ratios of several models."""
    return torch.tensor([cost.ratios() for cost in costs]).log().mean(0).exp().tolist()


def _verdict(ratio: float, aim: float) -> str:
    return f"aim {aim:.2f}, {'met' if round(ratio, 2) <= aim else 'missed'}"


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    sys.exit(main())
