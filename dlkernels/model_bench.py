"""What accelerate() does to torchvision's and timm's models: correctness, time and memory.

The table in the documentation (tools/accelerate_table.py), ``python -m dlkernels bench MODEL`` and
``benchmarks/bench_models.py`` take their figures from here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dlkernels.accelerate import Report, accelerate
from dlkernels.accelerate.verify import Comparison, Verification
from dlkernels.measure import interleaved_timings, peak_cpu_memory

# The modules of timm whose models are of the families, and which of them are.
TIMM = {
    "efficientnet": r".*",
    "mobilenetv3": r".*",
    "densenet": r".*",
    "regnet": r"regnet[yz].*",
    "rexnet": r".*",
    "resnest": r".*",
    "senet": r".*",
    "resnet": r"se.*|resnetrs.*",
    "sknet": r".*",
    "ghostnet": r".*",
}
TORCHVISION = r"densenet.*|efficientnet.*|mobilenet.*|mnasnet.*|regnet_y.*"


def model_names() -> list[str]:
    """All models of the families, as ``library/model``."""
    import timm
    import torchvision

    names = [
        f"torchvision/{name}"
        for name in torchvision.models.list_models(module=torchvision.models)
        if re.fullmatch(TORCHVISION, name)
    ]
    for module, pattern in TIMM.items():
        found = timm.list_models(module=module)
        names += [f"timm/{name}" for name in found if re.fullmatch(pattern, name)]
    return names


def full_name(name: str) -> str:
    """``library/model`` of a model's name, with or without its library; torchvision's first.

    Raises:
        ValueError: neither torchvision nor timm has such a model.
    """
    import timm
    import torchvision

    library, _, model = name.rpartition("/")
    if library in ("", "torchvision") and model in torchvision.models.list_models():
        return f"torchvision/{model}"
    if library in ("", "timm") and timm.is_model(model):
        return f"timm/{model}"
    raise ValueError(f"{name!r} is no model of torchvision or timm")


def make_model(name: str) -> nn.Module:
    """The model ``library/model`` with random weights, always the same."""
    import timm
    import torchvision

    library, model = name.split("/")
    torch.manual_seed(0)
    if library == "timm":
        return timm.create_model(model)
    return torchvision.models.get_model(model, weights=None)


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """Gives random weights the batch norms of a trained network, so that every block counts."""
    momenta = {}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.weight is not None:
                nn.init.ones_(module.weight)  # some libraries start a block's last one at zero
            momenta[module], module.momentum = module.momentum, 1.0
    with torch.no_grad():
        model.train()(x)
    for module, momentum in momenta.items():
        module.momentum = momentum
    return model


# ---- correctness ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correctness:
    """What accelerate() swapped in a model, and how exact the model is.

    Attributes:
        swapped: the number of swapped modules of each type.
        left: for each reason the number of modules left for it.
        comparisons: those of outputs, gradients and buffers as a whole, and of their parts that
            which is nearest to its limit.
    """

    swapped: dict[str, int]
    left: dict[str, int]
    comparisons: list[Comparison]

    @property
    def state(self) -> str:
        """``"swapped"``, ``"partly"`` or ``"left"``; convolutions are in every model."""
        if not self.swapped.keys() - {"Conv2d"}:
            return "left"
        return "partly" if self.left else "swapped"


def correctness(name: str, batch: int, size: int) -> Correctness:
    """Swaps, verified; see :class:`dlkernels.accelerate.verify.Verification`.

    Args:
        name: ``library/model``.
        batch: images of random values.
        size: their height and width.
    """
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = settled(make_model(name), x)
    verification = Verification(model, x)
    report = accelerate(model)
    comparisons = verification.compare(strict=False)
    parts = [c for c in comparisons if " of " in c.name]
    whole = [c for c in comparisons if " of " not in c.name]
    comparisons = [*whole, *sorted(parts, key=lambda c: c.share)[-1:]]
    return Correctness(_kinds(report), _reasons(report), comparisons)


def _kinds(report: Report) -> dict[str, int]:
    kinds = [type(module).__name__ for module in report.swapped.values()]
    activations = {"Identity"} | {k for k in kinds if k in nn.modules.activation.__all__}
    return _counts([kind for kind in kinds if kind not in activations])


def _reasons(report: Report) -> dict[str, int]:
    # Names and numbers of single modules say nothing of the model.
    return _counts([re.sub(r"\d+ places", "several places", r) for r in report.left.values()])


def _counts(values: list[str]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}


# ---- time and memory -----------------------------------------------------------------------------

Step = Callable[[], object]


def steps(
    name: str,
    batch: int,
    size: int,
    training: bool,
    compiled: bool,
    channels_last: bool = False,
    device: str = "cpu",
) -> tuple[dict[str, Step], dict[str, Step]]:
    """Calls to time by their names, the accelerated model's first, and those to weigh.

    Args:
        name: ``library/model``.
        batch: images.
        size: their height and width.
        training: whether a call is forward and backward, or inference.
        compiled: whether torch.compile is among the peers.
        channels_last: whether models and images are.
        device: of both.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=memory_format)

    def model() -> nn.Module:
        made: nn.Module = make_model(name).train(training)
        return made.to(device, memory_format=memory_format)  # type: ignore[call-overload]

    accelerated = model()
    accelerate(accelerated)
    call = _train if training else _infer
    weighed: dict[str, Step] = {
        "dlkernels": partial(call, accelerated, x),
        "eager": partial(call, model(), x),
    }
    timed = dict(weighed)
    if compiled:
        torch._dynamo.reset()
        timed["torch.compile"] = partial(call, torch.compile(model()), x)  # type: ignore[arg-type]
    return timed, weighed


def _infer(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def _train(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()
    model.zero_grad()


LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Cost:
    """A training step: median and quartiles in seconds, and peak memory in bytes.

    By name and layout, such as ``"eager, channels_last"``.
    """

    seconds: dict[str, tuple[float, float, float]]
    peak: dict[str, int]


def cost(name: str, batch: int, size: int, rounds: int, compiled: bool) -> Cost:
    """The cost of a training step of the model, accelerated and not, in both memory layouts.

    torch.compile, which takes minutes, is measured in channels_last only, its faster layout where
    both were tried.

    Args:
        name: ``library/model``.
        batch: images.
        size: their height and width.
        rounds: of interleaved runs.
        compiled: whether torch.compile is measured, too.
    """
    calls: dict[str, Step] = {}
    for layout in LAYOUTS:
        last = layout == "channels_last"
        timed, _ = steps(name, batch, size, True, compiled and last, last)
        calls |= {f"{call}, {layout}": step for call, step in timed.items()}
    timings = interleaved_timings(calls, rounds)  # torch.compile may compile the second, too
    seconds = {call: (t.median, t.low, t.high) for call, t in timings.items()}
    return Cost(seconds, {call: peak_cpu_memory(step) for call, step in calls.items()})
