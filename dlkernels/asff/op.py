"""The op ``dlkernels::asff_fuse``: public function, fake kernels, gradient, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dlkernels import backend
from dlkernels.asff import reference
from dlkernels.checks import check_choice, check_like, check_maps, check_sequence, describe
from dlkernels.memory_format import empty_maps, finest, new_maps
from dlkernels.watch import watched

_TRITON = "dlkernels.asff.triton"

MIN_LEVELS, MAX_LEVELS = 2, 5


@watched
def asff_fuse(features: Sequence[Tensor], logits: Tensor, mode: str = "nearest") -> Tensor:
    r"""Adaptively spatial feature fusion: the pyramid's levels, weighted pixel by pixel.

    .. code-block:: text

        weights = softmax of logits over its levels                          [N, L, H, W]
        out     = sum over levels i of weights[:, i] * upsample(features[i])  [N, C, H, W]

    Liu, Huang and Wang, "Learning Spatial Fusion for Single-Shot Object Detection" (2019), section
    3.3, equations 1 and 2; the upsampling of section 3.2 happens in the same pass, so that no
    enlarged map is ever stored.

    float32, bfloat16 and float16 run in the fused kernels with float32 accumulation, float64 in
    the reference formula. Contiguous and channels_last maps are both read as they are; the result
    has the memory format of the largest feature. Under autocast all tensors are cast to the
    autocast dtype.

    Saved for backward: ``features`` and ``logits``, nothing else.

    Args:
        features: 2 to 5 maps [N, C, H / s, W / s], each with its own factor s of 1, 2, 4 or 8.
        logits: [N, L, H, W], one channel per feature; dtype and device of the features.
        mode: ``"nearest"``, or ``"bilinear"`` as ``torch.nn.functional.interpolate`` with
            ``align_corners=False``.

    Returns:
        Maps [N, C, H, W] of the features' dtype.

    Raises:
        TypeError: an argument is no tensor (``features`` no list or tuple of them), or not of a
            floating-point dtype, or dtypes differ.
        ValueError: shapes do not fit, devices differ, or the mode is unknown.
    """
    _check(features, logits, mode)
    if backend.select("asff_fuse", logits) == "reference":
        return reference.asff_fuse(features, logits, mode)
    return _OP(list(features), logits, mode)


def _check(features: Any, logits: Any, mode: str) -> None:
    check_sequence("features", features, "tensors")
    if not MIN_LEVELS <= len(features) <= MAX_LEVELS:
        raise ValueError(
            f"features must hold {MIN_LEVELS} to {MAX_LEVELS} maps, but holds {len(features)}"
        )
    check_maps("logits", logits)
    if logits.shape[1] != len(features) or 0 in logits.shape[2:]:
        raise ValueError(
            f"logits must have shape [N, {len(features)}, H, W], one channel per feature and at "
            f"least one pixel, but is {describe(logits)}"
        )
    for index, x in enumerate(features):
        name = f"features[{index}]"
        check_maps(name, x)
        check_like(name, x, "logits", logits)
        _check_size(name, x, features[0], logits)
    check_choice("mode", mode, reference.MODES)


def _check_size(name: str, x: Tensor, first: Tensor, logits: Tensor) -> None:
    samples, _, height, width = logits.shape
    channels = first.shape[1]
    fits = x.shape[:2] == (samples, channels) and any(
        (height, width) == (factor * x.shape[2], factor * x.shape[3])
        for factor in reference.FACTORS
    )
    if not fits:
        raise ValueError(
            f"{name} must have shape [{samples}, {channels}, {height} / s, {width} / s] for a "
            f"factor s of 1, 2, 4 or 8, but is {describe(x)}"
        )


def _fake(features: list[Tensor], logits: Tensor, mode: str) -> Tensor:
    samples, _, height, width = logits.shape
    like = finest(features)
    return new_maps(like, (samples, like.shape[1], height, width))


def _fake_backward(
    grad_out: Tensor, features: list[Tensor], logits: Tensor, mode: str
) -> tuple[list[Tensor], Tensor]:
    like = finest(features)
    return [new_maps(like, x.shape) for x in features], empty_maps(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, logits, ctx.mode = inputs
    ctx.save_for_backward(*features, logits)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    *features, logits = ctx.saved_tensors
    return *_BACKWARD_OP(grad_out, features, logits, ctx.mode), None


_OP = backend.define(
    "asff_fuse", "(Tensor[] features, Tensor logits, str mode) -> Tensor", _fake, _TRITON
)
_BACKWARD_OP = backend.define(
    "asff_fuse_backward",
    "(Tensor grad_out, Tensor[] features, Tensor logits, str mode) "
    "-> (Tensor[] grad_features, Tensor grad_logits)",
    _fake_backward,
    _TRITON,
)
backend.register_autograd("asff_fuse", _backward, _setup_context)
backend.refuse_double_backward("asff_fuse_backward")
backend.register_autocast("asff_fuse")
