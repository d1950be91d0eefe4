"""Times a function and its named peers in turn, in one run.

The first function is the library's; pytest-benchmark's own table shows it. Peers and the floor (a
plain copy of the bytes that must move) are timed interleaved with it, so that the ratios hold when
the machine's speed drifts; the summary at the end of the run shows them.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor

from dlkernels.measure import Timing, interleaved_timings, peak_cpu_memory

FORMATS = [torch.contiguous_format, torch.channels_last]
# The fewest; short calls, whose times scatter more, get as many as fit in a second.
ROUNDS = 15
MOST_ROUNDS = 101
MISSING = "not installed"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

rows: list[dict[str, Any]] = []


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory instead of handing it back to the system.

    Whether a tensor of many megabytes costs page faults (several times the time of filling it)
    depends otherwise on the order in which a process freed tensors before, which is luck. Training
    processes run with allocators that keep memory, too (PyTorch's performance tuning guide).
    """
    trim_threshold, mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


keep_freed_memory()
# Compiling in this process alone: idle compile workers would share the cores with the timings.
torch._inductor.config.compile_threads = 1


def compare(
    benchmark,
    functions: Mapping[str, Callable[..., Tensor] | None],
    inputs: Sequence[Tensor],
    training: bool,
    floor: Callable[[], object],
    *,
    memory: bool = False,
    rounds: int = ROUNDS,
    also_ours: Collection[str] = (),
) -> None:
    """Times every function on the inputs and adds a row to the summary.

    In training all inputs get gradients, and a call is forward and backward. With ``memory`` the
    row also shows each function's peak memory, counted exactly (CPU only). Functions named in
    ``also_ours`` are the library's, too, and no peers; a peer that is None is shown as missing.
    """
    torch.set_num_threads(2)
    torch._dynamo.reset()
    as_call = _training_step if training else _inference
    calls: dict[str, Callable[[], object] | None] = {
        name: None if function is None else as_call(function, inputs)
        for name, function in functions.items()
    }
    add_row(
        benchmark,
        {**calls, "floor": floor},
        weighed=[name for name, call in calls.items() if memory and call is not None],
        rounds=rounds,
        most_rounds=MOST_ROUNDS,
        also_ours=also_ours,
    )


def add_row(
    benchmark,
    calls: Mapping[str, Callable[[], object] | None],
    *,
    weighed: Collection[str] = (),
    rounds: int = ROUNDS,
    most_rounds: int = 0,
    also_ours: Collection[str] = (),
) -> None:
    """Times the calls in turn and adds a row to the summary.

    The first call is the library's, ``also_ours`` names more of them, ``"floor"`` is the floor, the
    others are peers; None stands for one that is missing. The peak memory of those in ``weighed``
    is counted. Short calls get more rounds, as many as fit in a second, up to ``most_rounds``.
    """
    present = {name: call for name, call in calls.items() if call is not None}
    ours = next(iter(present))
    once = sum(t.median for t in interleaved_timings(present, rounds=1).values())
    rounds = max(rounds, min(most_rounds, int(1 / once)))
    timings = interleaved_timings(present, rounds)
    peaks = {name: peak_cpu_memory(present[name]) / 2**20 for name in weighed}
    rows.append(row_of(benchmark.name.removeprefix("test_"), calls, timings, peaks, also_ours))
    benchmark.extra_info.update(rows[-1])
    benchmark.pedantic(present[ours], rounds=3, iterations=1)


def row_of(
    name: str,
    calls: Collection[str],
    timings: Mapping[str, Timing],
    peaks: Mapping[str, float],
    also_ours: Collection[str] = (),
) -> dict[str, Any]:
    """A row of the summary; ``timings`` lacks the calls that are missing."""
    ours, *others = calls
    medians = {name: timing.median for name, timing in timings.items()}
    peers = [other for other in others if other not in (*also_ours, "floor")]
    mine = min(medians[name] for name in (ours, *also_ours) if name in medians)
    best = min((peer for peer in peers if peer in medians), key=medians.__getitem__, default="")
    row: dict[str, Any] = {
        "benchmark": name,
        **{f"{call} ms": 1e3 * medians[call] if call in medians else MISSING for call in calls},
        **{f"{call} MiB": peak for call, peak in peaks.items()},
        "best peer": best,
    }
    if best:
        row["ratio to best"] = mine / medians[best]
    if "floor" in medians:
        row["ratio to floor"] = mine / medians["floor"]
    row["spread"] = max((t.high - t.low) / t.median for t in timings.values())
    row["peers"] = peers
    row["quartiles ms"] = {c: [1e3 * t.low, 1e3 * t.high] for c, t in timings.items()}
    return row


def onnxruntime_call(model: torch.nn.Module, x: Tensor) -> Callable[[], object] | None:
    """Inference of the exported model on the input by onnxruntime; None if it is missing."""
    try:
        import onnxruntime
    except ImportError:
        return None
    buffer = io.BytesIO()
    torch.onnx.export(model, (x,), buffer, input_names=["x"], verbose=False, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads that spin would slow down whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(buffer.getvalue(), options)
    values = x.numpy()
    return lambda: session.run(None, {"x": values})


def _inference(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return call


def _training_step(
    function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> Callable[[], object]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    grad = torch.randn_like(function(*leaves))

    def call() -> None:
        function(*leaves).backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return call
