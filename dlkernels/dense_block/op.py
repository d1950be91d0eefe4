"""The op ``dlkernels::dense_block``: public function, fake kernels, gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlkernels import backend
from dlkernels.batch_norm_act.op import check_eps
from dlkernels.checks import (
    check_choice,
    check_constant,
    check_device,
    check_flag,
    check_like,
    check_maps,
    check_number,
    check_sequence,
    check_shape,
    check_tensor,
)
from dlkernels.dense_block import reference
from dlkernels.memory_format import memory_format_of
from dlkernels.watch import watched

MEMORY = ("balanced", "minimal")


class NormConv(NamedTuple):
    """A batch norm, and the convolution without bias after its ReLU.

    Attributes:
        norm_weight: [in], float32 or the dtype of the maps.
        norm_bias: [in].
        running_mean: [in], or None where none is kept.
        running_var: [in], or None.
        weight: of the convolution, [out, in, 1, 1] or [out, in, 3, 3].
    """

    norm_weight: Tensor
    norm_bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor


@watched
def dense_block(
    x: Tensor,
    layers: Sequence[Sequence[NormConv]],
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    dropout: float = 0.0,
    memory: str = "balanced",
) -> Tensor:
    r"""A block of densely connected layers, on one buffer that every layer adds its channels to.

    .. code-block:: text

        features = x                                                      [N, C, H, W]
        for each layer, of one or two (norm, convolution):
            new = features
            for each norm and convolution: new = conv(relu(norm(new)))    [N, k, H, W]
            features = concatenate(features, dropout(new))                [N, C + k, H, W]

    Huang, Liu, van der Maaten and Weinberger, "Densely Connected Convolutional Networks" (2017),
    section 3, equation 2; the layer of two convolutions, 1x1 then 3x3, is its DenseNet-B. That
    memory need not grow with the square of the depth: Pleiss et al., "Memory-Efficient
    Implementation of DenseNets" (2017). Convolutions have stride 1 and pad with zeros.

    A channel's batch statistics are computed once, for all layers that read it. Running statistics
    are updated in place as ``torch.nn.functional.batch_norm`` does. float32, bfloat16 and float16
    run in the fused kernels with float32 accumulation, float64 in the reference formula. Contiguous
    and channels_last maps are both read as they are; the result has the memory format of ``x``.
    On CPUs the 3x3 convolutions are minimal filtering, as in :func:`dlkernels.ops.conv3x3`: what
    is neither NaN nor infinite in PyTorch's sum may be NaN in the 2x2 tile of an output that is.
    On CUDA they are cuDNN's, which repeats its bits only under
    ``torch.backends.cudnn.deterministic``.
    Under autocast the maps and convolutions are cast to the autocast dtype, the norms stay float32.

    Saved for backward: the result itself; mean and variance of each of its channels and of each
    bottleneck's (float32, in training); all parameters; with ``memory="balanced"`` the result of
    every 1x1 convolution, with ``"minimal"`` nothing more; with dropout a byte for each value that
    a layer adds.

    Args:
        x: maps [N, C, H, W].
        layers: for each layer its (norm, 1x1 convolution), (norm, 3x3 convolution), or only the
            latter; all of one kind and with the same widths.
        training: normalise with the batch's statistics and update the running ones, if any;
            else normalise with the running ones.
        momentum: of the running statistics.
        eps: added to the variances.
        dropout: probability with which a value that a layer adds is zeroed, in training.
        memory: ``"balanced"`` or ``"minimal"``; see above.

    Returns:
        Maps [N, C + layers * k, H, W], the dtype and memory format of ``x``.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype, or dtypes differ.
        ValueError: shapes do not fit, devices differ, ``memory`` is unknown, ``dropout`` is no
            probability, ``momentum`` no share, ``eps`` out of range, running statistics are missing
            outside training or expanded in training, or a channel has but one value to take
            statistics of.
    """
    check_maps("x", x)
    check_choice("memory", memory, MEMORY)
    check_options(training, momentum, eps)
    check_number("dropout", dropout)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), but is {dropout}")
    stages = _check_layers(x, layers, training)
    if training:
        check_batch("x", x)

    weights = [stage.weight for stage in stages]
    stages = [cast_norms(stage, x.dtype) for stage in stages]
    means = [] if training else [stage.running_mean for stage in stages]
    variances = [] if training else [stage.running_var for stage in stages]
    kept = _kept_by_dropout(x, layers, dropout) if training and dropout > 0 else None
    rest = (
        [stage.norm_weight for stage in stages],
        [stage.norm_bias for stage in stages],
        means,
        variances,
        kept,
        dropout,
        eps,
    )
    if backend.select("dense_block", x) == "reference":
        x, weights = cast_to_autocast(x, weights)
        out, mean, variance = reference.dense_block(x, weights, *rest)
    else:
        saves = memory == "balanced" and _needs_gradient(x, stages)
        out, _, mean, variance = _OP(x, weights, *rest, saves)
    if training:
        _update_block(layers, mean, variance, momentum, x)
    return out


# ---- arguments ----------------------------------------------------------------------------------


def check_options(training: Any, momentum: Any, eps: Any) -> None:
    """How to normalise.

    Raises:
        TypeError: ``training`` is no bool, or another is no number.
        ValueError: ``momentum`` is no share, or ``eps`` cannot be added to a variance.
    """
    check_flag("training", training)
    check_eps("eps", eps, training)
    check_number("momentum", momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], but is {momentum}")


def _check_layers(
    x: Tensor, layers: Sequence[Sequence[NormConv]], training: bool
) -> list[NormConv]:
    """All norms and convolutions in the order in which they run, if they fit together."""
    check_sequence("layers", layers, "layers")
    for number, layer in enumerate(layers):
        check_sequence(f"layers[{number}]", layer, "norms and convolutions")
        for place, stage in enumerate(layer):
            check_is_stage(f"layers[{number}][{place}]", stage)
    if len(layers) == 0 or any(len(layer) not in (1, 2) for layer in layers):
        raise ValueError("layers must hold at least one layer, each of one or two convolutions")
    channels, stages = x.shape[1], []
    first = layers[0]
    for place, stage in enumerate(first):
        check_tensor(f"layers[0][{place}].weight", stage.weight)
    growth = first[-1].weight.shape[0]
    for number, layer in enumerate(layers):
        if len(layer) != len(first):
            raise ValueError(f"layers[{number}] must have {len(first)} convolutions as layers[0]")
        width = channels
        for place, stage in enumerate(layer):
            last = place == len(layer) - 1
            out = growth if last else first[0].weight.shape[0]
            kernel = 3 if last else 1
            name = f"layers[{number}][{place}]"
            check_stage(name, stage, x, [out, width, kernel, kernel], training)
            width = out
            stages.append(stage)
        channels += growth
    return stages


def check_is_stage(name: str, stage: Any) -> None:
    """``stage`` is a :class:`NormConv`."""
    if not isinstance(stage, NormConv):
        raise TypeError(f"{name} must be a NormConv, but is {type(stage).__name__}")


def check_stage(name: str, stage: NormConv, x: Tensor, shape: list[int], training: bool) -> None:
    """The tensors of a norm and its convolution fit each other and the maps ``x``."""
    check_like(f"{name}.weight", stage.weight, "x", x)
    check_shape(f"{name}.weight", stage.weight, shape, "[out, in, kernel, kernel]")
    if 0 in shape:
        raise ValueError(f"{name}.weight must have inputs and outputs, but has shape {shape}")
    for field in ("norm_weight", "norm_bias", "running_mean", "running_var"):
        value = getattr(stage, field)
        if value is None and field.startswith("running"):
            if not training:
                raise ValueError(f"{name}.{field} must be given outside training, but is None")
            continue
        check_tensor(f"{name}.{field}", value)
        check_shape(f"{name}.{field}", value, [shape[1]], "one value per input channel")
        check_device(f"{name}.{field}", value, "x", x)
        if field.startswith("running"):
            check_constant(f"{name}.{field}", value)
        if training and field.startswith("running") and value.stride(0) == 0 != len(value) - 1:
            raise ValueError(f"{name}.{field} must not be expanded, as it is updated in place")


def channels_of_conv1x1(name: str, weight: Tensor) -> tuple[int, int]:
    """Outputs and inputs of the weight of a 1x1 convolution, if it has four dimensions."""
    check_tensor(name, weight)
    if weight.dim() != 4:
        raise ValueError(f"{name} must have shape [out, in, 1, 1], but has {list(weight.shape)}")
    return weight.shape[0], weight.shape[1]


def check_batch(name: str, maps: Tensor) -> None:
    """There is more than one value to take the statistics of a channel of."""
    if maps.numel() == maps.shape[1] != 0:
        raise ValueError(
            f"{name} must have more than one value per channel in training, but has shape "
            f"{list(maps.shape)}"
        )


def cast_norms(stage: NormConv, dtype: torch.dtype) -> NormConv:
    """The stage with its norm in the dtype that kernels compute in for maps of a dtype."""
    norms = torch.float64 if dtype == torch.float64 else torch.float32
    mean, variance = stage.running_mean, stage.running_var
    return NormConv(
        stage.norm_weight.to(norms).contiguous(),
        stage.norm_bias.to(norms).contiguous(),
        None if mean is None else mean.to(norms).contiguous(),
        None if variance is None else variance.to(norms).contiguous(),
        stage.weight,
    )


def cast_to_autocast(maps: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What the op's autocast rule casts, for the reference formula."""
    device = maps.device.type
    if not torch.is_autocast_enabled(device) or maps.dtype == torch.float64:
        return maps, weights
    dtype = torch.get_autocast_dtype(device)
    return maps.to(dtype), [weight.to(dtype) for weight in weights]


def _kept_by_dropout(x: Tensor, layers: Sequence[Sequence[NormConv]], dropout: float) -> Tensor:
    samples, _, height, width = x.shape
    growth = layers[0][-1].weight.shape[0]
    shape = (len(layers), samples, height, width, growth)
    return torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout)


def _needs_gradient(x: Tensor, stages: list[NormConv]) -> bool:
    return torch.is_grad_enabled() and any(
        tensor.requires_grad
        for tensor in (x, *(t for s in stages for t in (s.norm_weight, s.norm_bias, s.weight)))
    )


def _update_block(
    layers: Sequence[Sequence[NormConv]],
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    x: Tensor,
) -> None:
    """Hands each norm of a block its part of the block's statistics."""
    stages, means, variances = [], [], []
    between = x.shape[1] + len(layers) * layers[0][-1].weight.shape[0]
    for layer in layers:
        for first, stage in zip((0, between), layer, strict=False):
            stages.append(stage)
            means.append(mean[first : first + stage.weight.shape[1]])
            variances.append(variance[first : first + stage.weight.shape[1]])
        between += layer[-1].weight.shape[1]
    update_running(stages, means, variances, momentum, x)


@torch.no_grad()
def update_running(
    stages: Sequence[NormConv],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    momentum: float,
    maps: Tensor,
) -> None:
    """Moves the running statistics towards those of the batch, the variance unbiased.

    An empty batch leaves them as they are, as in ``nn.BatchNorm2d``.
    """
    count = maps.numel() // max(1, maps.shape[1])
    if count == 0:
        return
    unbiased = torch._foreach_mul(list(variances), count / max(1, count - 1))
    running, batch = [], []
    for stage, mean, variance in zip(stages, means, unbiased, strict=True):
        pairs = ((stage.running_mean, mean), (stage.running_var, variance))
        for target, source in pairs:
            if target is not None:
                running.append(target)
                batch.append(source.to(target.dtype))
    if running:
        torch._foreach_lerp_(running, batch, momentum)


# ---- the dispatcher's op ------------------------------------------------------------------------


def _fake(
    x: Tensor,
    weights: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    kept: Tensor | None,
    dropout: float,
    eps: float,
    save_bottlenecks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples, channels, height, width = x.shape
    bottleneck = weights[0].shape[2] == 1
    layers = len(weights) // (2 if bottleneck else 1)
    between = weights[0].shape[0] if bottleneck else 0
    channels += layers * weights[-1].shape[0]
    out = torch.empty(
        (samples, channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format_of(x),
    )
    saved = layers if save_bottlenecks else 0
    bottlenecks = x.new_empty((saved * samples, height, width, between))
    statistics = 0 if means else channels + layers * between
    mean = x.new_empty((statistics,), dtype=torch.float32)
    return out, bottlenecks, mean, torch.empty_like(mean)


def _fake_backward(
    grad_out: Tensor,
    out: Tensor,
    bottlenecks: Tensor,
    mean: Tensor,
    variance: Tensor,
    weights: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    kept: Tensor | None,
    dropout: float,
    eps: float,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    samples, _, height, width = out.shape
    grad_x = torch.empty(
        (samples, weights[0].shape[1], height, width),
        dtype=out.dtype,
        device=out.device,
        memory_format=memory_format_of(out),
    )

    def contiguous_like(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]

    return (
        grad_x,
        contiguous_like(weights),
        contiguous_like(norm_weights),
        contiguous_like(norm_biases),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weights, norm_weights, norm_biases, means, variances, kept, dropout, eps, _ = inputs
    out, bottlenecks, mean, variance = output
    ctx.mark_non_differentiable(bottlenecks, mean, variance)
    ctx.set_materialize_grads(False)
    lists = (weights, norm_weights, norm_biases, means, variances)
    ctx.lengths = [len(tensors) for tensors in lists]
    ctx.save_for_backward(
        out, bottlenecks, mean, variance, kept, *(tensor for tensors in lists for tensor in tensors)
    )
    ctx.numbers = dropout, eps


def _split(tensors: Iterator[Tensor], lengths: list[int]) -> list[list[Tensor]]:
    return [list(islice(tensors, length)) for length in lengths]


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 10
    out, bottlenecks, mean, variance, kept, *rest = ctx.saved_tensors
    lists = _split(iter(rest), ctx.lengths)
    grad_x, *grads = _BACKWARD_OP(
        grad_out, out, bottlenecks, mean, variance, *lists, kept, *ctx.numbers
    )
    none = [[None] * length for length in ctx.lengths[3:]]
    return grad_x, *grads, *none, None, None, None, None


_OP = backend.define(
    "dense_block",
    "(Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, Tensor[] means, "
    "Tensor[] variances, Tensor? kept, float dropout, float eps, bool save_bottlenecks) "
    "-> (Tensor out, Tensor bottlenecks, Tensor mean, Tensor variance)",
    _fake,
    "dlkernels.dense_block.triton",
)
_BACKWARD_OP = backend.define(
    "dense_block_backward",
    "(Tensor grad_out, Tensor out, Tensor bottlenecks, Tensor mean, Tensor variance, "
    "Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, Tensor[] means, "
    "Tensor[] variances, Tensor? kept, float dropout, float eps) "
    "-> (Tensor grad_x, Tensor[] grad_weights, Tensor[] grad_norm_weights, "
    "Tensor[] grad_norm_biases)",
    _fake_backward,
    "dlkernels.dense_block.triton",
)
backend.register_autograd("dense_block", _backward, _setup_context)
backend.register_autocast("dense_block", ("x", "weights"))
backend.refuse_double_backward("dense_block_backward")
