"""The formula of a dense block in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dlkernels.batch_norm_act.reference import batch_statistics


def norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
) -> Tensor:
    """Batch norm, with the batch's own statistics where none are given, and ReLU."""
    return F.relu(F.batch_norm(x, mean, variance, weight, bias, mean is None, 0.0, eps))


def dense_block(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    means: Sequence[Tensor | None],
    variances: Sequence[Tensor | None],
    kept: Tensor | None,
    dropout: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's output, and mean and biased variance of all that was normalised.

    See :func:`dlkernels.ops.dense_block`. The convolutions are given in the order in which they
    run, each with the norm before it; ``kept`` is what dropout keeps, [layers, N, H, W, growth].
    The statistics are those of the block's channels, followed by those of the bottlenecks'; both
    are empty where ``means`` and ``variances`` are given.
    """
    per_layer = 2 if weights[0].shape[2] == 1 else 1
    features = x
    between: list[Tensor] = []
    for index, weight in enumerate(weights):
        layer, place = divmod(index, per_layer)
        source = features if place == 0 else between[-1]
        mean, variance = (means[index], variances[index]) if means else (None, None)
        activated = norm_relu(source, norm_weights[index], norm_biases[index], mean, variance, eps)
        result = F.conv2d(activated, weight, padding=weight.shape[2] // 2)
        if place < per_layer - 1:
            between.append(result)
            continue
        if kept is not None:
            result = result * kept[layer].permute(0, 3, 1, 2) / (1 - dropout)
        features = torch.cat([features, result], 1)
    if means:
        return features, x.new_empty(0), x.new_empty(0)
    statistics = [batch_statistics(maps.detach()) for maps in (features, *between)]
    means, variances = zip(*statistics, strict=True)
    return features, torch.cat(means), torch.cat(variances)


def norm_relu_pool(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm, ReLU and 2x2 average pool, and the batch's statistics where none are given."""
    out = F.avg_pool2d(norm_relu(x, norm_weight, norm_bias, mean, variance, eps), 2)
    if mean is not None:
        return out, x.new_empty(0), x.new_empty(0)
    return out, *batch_statistics(x.detach())


def channel_statistics(maps: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a slice of channels, in float32 at least."""
    part = maps[:, first : first + count]
    return batch_statistics(part if part.dtype == torch.float64 else part.float())


def bn_relu_conv1x1(
    maps: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    first: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, ReLU and 1x1 convolution of a slice, and its statistics where none are given."""
    part = maps[:, first : first + weight.shape[1]]
    out = F.conv2d(norm_relu(part, norm_weight, norm_bias, mean, variance, eps), weight)
    if mean is not None:
        return out, maps.new_empty(0), maps.new_empty(0)
    return out, *channel_statistics(part.detach(), 0, weight.shape[1])
