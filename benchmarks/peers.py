"""Times a function and its named peers in turn, in one run.

The first function is the library's; pytest-benchmark's own table shows it. Peers and the floor (a
plain copy of the bytes that must move) are timed interleaved with it, so that the ratios hold when
the machine's speed drifts; the summary at the end of the run shows them.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Callable, Collection, Sequence

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from dlkernels.measure import interleaved_medians, peak_cpu_memory

FORMATS = [torch.contiguous_format, torch.channels_last]
# The fewest; short calls, whose times scatter more, get as many as fit in a second.
ROUNDS = 15
MOST_ROUNDS = 101
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

rows: list[dict[str, str | float]] = []


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
    functions: dict[str, Callable[..., Tensor]],
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
    ``also_ours`` are the library's, too, and no peers.
    """
    torch.set_num_threads(2)
    torch._dynamo.reset()
    calls = {
        name: _training_step(function, inputs) if training else _inference(function, inputs)
        for name, function in functions.items()
    }
    calls["floor"] = floor
    once = sum(interleaved_medians(calls, rounds=1).values())
    rounds = max(rounds, min(MOST_ROUNDS, int(1 / once)))
    medians = interleaved_medians(calls, rounds)
    peaks = {f"{name} MiB": peak_cpu_memory(calls[name]) / 2**20 for name in functions if memory}
    ours, *others = functions
    peers = [name for name in others if name not in also_ours]
    best = min(peers, key=medians.__getitem__)
    rows.append(
        {
            "benchmark": benchmark.name.removeprefix("test_"),
            **{f"{name} ms": 1e3 * medians[name] for name in calls},
            **peaks,
            "best peer": best,
            "ratio to best": medians[ours] / medians[best],
            "ratio to floor": medians[ours] / medians["floor"],
        }
    )
    benchmark.extra_info.update(rows[-1])
    benchmark.pedantic(calls[ours], rounds=3, iterations=1)


def onnxruntime_call(model: torch.nn.Module, x: Tensor) -> Callable[[], object]:
    """Inference of the exported model on the input by onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
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
