"""The op ``dlkernels::residual_sum``: public function, passes over maps, gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlkernels import backend
from dlkernels.batch_norm_act.op import check_batch, check_norm
from dlkernels.batch_norm_act.reference import Norm
from dlkernels.checks import check_choice, check_like, check_maps, check_shape
from dlkernels.excitation import Excitation, check_excitation
from dlkernels.memory_format import empty_maps
from dlkernels.residual_sum import reference
from dlkernels.watch import watched

_TRITON = "dlkernels.residual_sum.triton"


class ResidualSumOutput(NamedTuple):
    """What :func:`residual_sum` returns.

    Attributes:
        out: maps [N, C, H, W].
        mean: the mean that each channel was normalised with, [C]; no gradient flows through it.
        var: the biased variance likewise.
    """

    out: Tensor
    mean: Tensor
    var: Tensor


@watched
def residual_sum(
    x: Tensor,
    shortcut: Tensor,
    norm: Norm,
    excitation: Excitation | None = None,
    *,
    activation: str = "relu",
) -> ResidualSumOutput:
    r"""The end of a residual block: batch norm, squeeze-and-excitation, sum and ReLU.

    .. code-block:: text

        normed = (x - mean) / sqrt(var + eps) * weight + bias            [N, C, H, W]
        gates  = excitation(mean of normed over H and W), or 1           [N, C]
        out    = activation(normed * gates + shortcut)                   [N, C, H, W]

    He et al., "Deep Residual Learning" (2016), figure 5; Hu, Shen and Sun, "Squeeze-and-Excitation
    Networks" (2018), figure 3. Without statistics in ``norm`` they are those of the batch.

    The mean of the normed maps follows from that of ``x``, so that one pass reads ``x`` for the
    statistics and one writes ``out``; backward has two passes likewise, and the normed maps are
    never stored. float32, bfloat16 and float16 run in the fused kernels with float32 accumulation,
    float64 in the reference formula. Contiguous and channels_last maps are both read as they are;
    the result has the memory format of ``x``. Autocast leaves the op's dtypes as they are; the two
    small layers of the excitation are computed in float32.

    Saved for backward: ``x``, ``out`` if ``activation`` is ``"relu"``, the weights, and values of
    the size of channels.

    Args:
        x: maps [N, C, H, W], the output of the block's last convolution.
        shortcut: shape and dtype of ``x``.
        norm: of ``x``, with the activation ``"identity"``.
        excitation: squeeze-and-excitation of the normed maps, or None.
        activation: after the sum, ``"identity"`` or ``"relu"``.

    Returns:
        out, mean and var.

    Raises:
        TypeError: an argument is no tensor, or its dtype is neither that of ``x`` nor float32.
        ValueError: shapes do not fit, devices differ, a name is unknown, or batch statistics are
            to be taken of a single value per channel.
    """
    check_maps("x", x)
    check_like("shortcut", shortcut, "x", x)
    check_shape("shortcut", shortcut, x.shape, "the shape of x")
    check_norm("norm", norm, x, x.shape[1], ("identity",))
    if excitation is not None:
        check_excitation(excitation, x.shape[1], x)
    check_choice("activation", activation, reference.ACTIVATIONS)
    if norm.mean is None:
        check_batch(x)
    if backend.select("residual_sum", x) == "reference":
        return ResidualSumOutput(*reference.residual_sum(x, shortcut, norm, excitation, activation))
    sample_mean, mean, var = _statistics(x, norm, excitation is not None)
    out = _ResidualSum.apply(
        x,
        shortcut,
        *norm[:2],
        *(excitation or Excitation(None, None, None, None))[:4],  # type: ignore[arg-type]
        sample_mean,
        mean,
        var,
        norm.mean is None,
        norm.eps,
        None if excitation is None else excitation[4:],
        activation,
    )
    return ResidualSumOutput(out, mean, var)


def channel_products(a: Tensor, b: Tensor) -> Tensor:
    """The sums over H and W of the products of maps [N, C, H, W], in float32, [N, C]."""
    return _REDUCE(a, None, b, torch.zeros(b.shape[1], device=b.device))[1]


@torch.no_grad()
def _statistics(x: Tensor, norm: Norm, excites: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Means of each sample [N, C], where they are needed, and mean and variance of the norm."""
    if norm.mean is not None and norm.var is not None:
        sample_mean = _MOMENTS(x)[0] if excites else None
        # Copies, since backward keeps them and running statistics change.
        mean, var = (value.to(torch.float32, copy=True) for value in (norm.mean, norm.var))
        return sample_mean, mean, var
    sample_mean, squares = _MOMENTS(x)
    samples, area = x.shape[0], x.shape[2] * x.shape[3]
    # Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    # variances" (1979). An empty batch has mean and variance 0.
    mean = sample_mean.sum(0) / max(1, samples)
    squares = squares.sum(0) + (sample_mean - mean).square().sum(0) * area
    return sample_mean, mean, squares / max(1, samples * area)


class _Affine(NamedTuple):
    """A batch norm in float32 as ``(x - mean) * scale + bias``."""

    mean: Tensor
    inverse: Tensor  # of the standard deviation
    scale: Tensor
    bias: Tensor

    @classmethod
    def of(
        cls, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> _Affine:
        inverse = (var + eps).rsqrt()
        scale = inverse if weight is None else inverse * weight.float()
        return cls(mean, inverse, scale, torch.zeros_like(mean) if bias is None else bias.float())


class _ResidualSum(torch.autograd.Function):
    """The op around its passes over maps; what lies between is of the size of channels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        squeeze_weight: Tensor | None,
        squeeze_bias: Tensor | None,
        excite_weight: Tensor | None,
        excite_bias: Tensor | None,
        sample_mean: Tensor | None,
        mean: Tensor,
        var: Tensor,
        batch_statistics: bool,
        eps: float,
        names: tuple[str, str] | None,
        activation: str,
    ) -> Tensor:
        """See :func:`residual_sum`; ``names`` are activation and gate of the excitation."""
        affine = _Affine.of(weight, bias, mean, var, eps)
        hidden = gates = None
        slope, offset = (value.expand(x.shape[:2]) for value in (affine.scale, affine.bias))
        if names is not None:
            assert squeeze_weight is not None
            assert excite_weight is not None
            assert sample_mean is not None
            layers = Excitation(squeeze_weight, squeeze_bias, excite_weight, excite_bias, *names)
            layers = layers.to(torch.float32)
            with torch.autocast(x.device.type, enabled=False):
                hidden = layers.hidden((sample_mean - mean) * affine.scale + affine.bias)
                gates = layers.gates_of_hidden(hidden)
            slope, offset = slope * gates, offset * gates
        relu = activation == "relu"
        out = _OP(x, shortcut, mean, slope.contiguous(), offset.contiguous(), relu)
        ctx.save_for_backward(
            *(x, out if relu else None, weight, bias),
            *(squeeze_weight, squeeze_bias, excite_weight, excite_bias),
            *(sample_mean, mean, var, hidden, gates),
        )
        ctx.options = batch_statistics, eps, names
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of maps, norm and excitation."""
        x, out, weight, bias, *layers, sample_mean, mean, var, hidden, gates = ctx.saved_tensors
        batch_statistics, eps, names = ctx.options
        affine = _Affine.of(weight, bias, mean, var, eps)
        # Of each sample's channels: the gradient of the sum, and its product with x - mean.
        total, product = _REDUCE(grad_out, out, x, mean)
        slope, offset = affine.scale.expand(x.shape[:2]), torch.zeros_like(total)
        of_layers: list[Tensor | None] = [None] * 4
        if names is not None:
            excitation = Excitation(*layers, *names).to(torch.float32)
            area = max(1, x.shape[2] * x.shape[3])
            deviation = sample_mean - mean
            grad_pooled, *of_layers = excitation.gradients(
                product * affine.scale + total * affine.bias,
                deviation * affine.scale + affine.bias,
                hidden,
                gates,
            )
            slope, offset = slope * gates, affine.scale * grad_pooled / area
            total = total * gates + grad_pooled
            product = product * gates + grad_pooled * deviation
        grad_bias, grad_weight = total.sum(0), product.sum(0) * affine.inverse
        tilt = torch.zeros_like(mean)
        if batch_statistics:
            count = max(1, x.shape[0] * x.shape[2] * x.shape[3])
            offset = offset - affine.scale * grad_bias / count
            tilt = -affine.scale * affine.inverse * grad_weight / count
        masks = out is not None and ctx.needs_input_grad[1]
        grad_x, grad_shortcut = _BACKWARD_OP(
            grad_out, out, x, mean, slope.contiguous(), offset.contiguous(), tilt, masks
        )
        grads = (
            *(grad_x, grad_shortcut if masks else grad_out, grad_weight, grad_bias),
            *of_layers,
        )
        wanted = (
            grad.to(like.dtype) if need and grad is not None else None
            for grad, need, like in zip(
                grads, ctx.needs_input_grad, (x, x, weight, bias, *layers), strict=False
            )
        )
        return *wanted, *(None,) * 7


def _fake_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    return mean, torch.empty_like(mean)


def _fake(
    x: Tensor, shortcut: Tensor, mean: Tensor, slope: Tensor, offset: Tensor, relu: bool
) -> Tensor:
    return empty_maps(x)


def _fake_reduce(
    grad_out: Tensor, out: Tensor | None, x: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    return _fake_moments(x)


def _fake_backward(
    grad_out: Tensor,
    out: Tensor | None,
    x: Tensor,
    mean: Tensor,
    slope: Tensor,
    offset: Tensor,
    tilt: Tensor,
    shortcut_grad: bool,
) -> tuple[Tensor, Tensor]:
    return empty_maps(x), empty_maps(x) if shortcut_grad else x.new_empty((0,))


# The passes over maps; values of the size of channels are [N, C], or [C] for all samples.
_MOMENTS = backend.define(
    "residual_sum_moments",
    # The mean of each sample's channels, and the sum of squared deviations from it.
    "(Tensor x) -> (Tensor mean, Tensor squares)",
    _fake_moments,
    _TRITON,
)
_OP = backend.define(
    "residual_sum",
    # out = activation((x - mean) * slope + offset + shortcut)
    "(Tensor x, Tensor shortcut, Tensor mean, Tensor slope, Tensor offset, bool relu) -> Tensor",
    _fake,
    _TRITON,
)
_REDUCE = backend.define(
    "residual_sum_reduce",
    # The sums of grad and grad * (x - mean), grad being grad_out where out is positive.
    "(Tensor grad_out, Tensor? out, Tensor x, Tensor mean) -> (Tensor total, Tensor product)",
    _fake_reduce,
    _TRITON,
)
_BACKWARD_OP = backend.define(
    "residual_sum_backward",
    # grad_shortcut = grad; grad_x = grad * slope + offset + (x - mean) * tilt
    "(Tensor grad_out, Tensor? out, Tensor x, Tensor mean, Tensor slope, Tensor offset, "
    "Tensor tilt, bool shortcut_grad) -> (Tensor grad_x, Tensor grad_shortcut)",
    _fake_backward,
    _TRITON,
)
for _name in ("residual_sum_moments", "residual_sum", "residual_sum_reduce"):
    backend.refuse_double_backward(_name)
backend.refuse_double_backward("residual_sum_backward")
