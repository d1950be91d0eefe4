"""Drop-ins for the dense layers, blocks and transitions of torchvision and timm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlkernels.batch_norm_act.sync import apply_norm, is_synchronized
from dlkernels.checks import check_choice
from dlkernels.dense_block.op import MEMORY, NormConv, dense_block
from dlkernels.dense_block.transition import transition


class DenseLayer(nn.Module):
    """A layer of a dense block: the channels that it adds to its input.

    Args:
        num_input_features: channels of the input.
        growth_rate: k, the channels that the layer adds.
        bn_size: the 1x1 convolution has ``bn_size * growth_rate`` outputs; None for a layer of
            one 3x3 convolution.
        drop_rate: probability of dropout after the last convolution.
        memory: as in :func:`dlkernels.ops.dense_block`.

    The names, and so the state-dict keys, are those of torchvision's and timm's dense layers:
    norm1, conv1, norm2 and conv2.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        memory: str = "balanced",
    ):
        super().__init__()
        check_choice("memory", memory, MEMORY)
        self.memory = memory
        self.drop_rate = float(drop_rate)
        self.norm1 = nn.BatchNorm2d(num_input_features)
        if bn_size is None:
            self.conv1 = nn.Conv2d(num_input_features, growth_rate, 3, padding=1, bias=False)
            return
        width = bn_size * growth_rate
        self.conv1 = nn.Conv2d(num_input_features, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """The new channels [N, growth_rate, H, W] of maps, or of a list of maps to concatenate."""
        x = features if isinstance(features, Tensor) else torch.cat(list(features), 1)
        return _run([self], x, self.memory)[:, x.shape[1] :]


class DenseBlock(nn.ModuleDict):
    """A dense block, as one fused op on one feature buffer.

    See :func:`dlkernels.ops.dense_block` for the formula and what is saved for backward. Arguments
    and state-dict keys are those of torchvision's ``_DenseBlock`` and timm's ``DenseBlock``.

    Batch norms that differ in mode, momentum or eps, or are ``nn.SyncBatchNorm``, run layer by
    layer in plain PyTorch.

    Args:
        num_layers: layers.
        num_input_features: channels of the input.
        bn_size: the 1x1 convolutions have ``bn_size * growth_rate`` outputs; None for layers of
            one 3x3 convolution.
        growth_rate: k, the channels that each layer adds.
        drop_rate: probability of dropout after the last convolution of each layer.
        memory: ``"balanced"`` or ``"minimal"``.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float = 0.0,
        memory: str = "balanced",
    ):
        super().__init__()
        check_choice("memory", memory, MEMORY)
        self.memory = memory
        for index in range(num_layers):
            channels = num_input_features + index * growth_rate
            layer = DenseLayer(channels, growth_rate, bn_size, drop_rate, memory)
            self.add_module(f"denselayer{index + 1}", layer)

    @classmethod
    def from_layers(
        cls, layers: Mapping[str, nn.Module], *, memory: str = "balanced"
    ) -> DenseBlock:
        """Builds the block around layers that exist, which keep their names and parameters.

        Args:
            layers: modules with norm1, conv1, norm2, conv2 and, unless it is 0, drop_rate, by name.
            memory: as in the constructor.
        """
        block = cls.__new__(cls)
        nn.ModuleDict.__init__(block, layers)
        check_choice("memory", memory, MEMORY)
        block.memory = memory
        return block

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, C + num_layers * growth_rate, H, W]."""
        return _run(list(self.values()), x, self.memory)

    def extra_repr(self) -> str:
        """The options, as ``print(module)`` shows them."""
        return f"memory={self.memory}"


class Transition(nn.Module):
    """The layer between two dense blocks, which halves height and width.

    See :func:`dlkernels.ops.transition`. Arguments and state-dict keys are those of torchvision's
    ``_Transition`` and timm's ``DenseTransition``.

    Args:
        num_input_features: channels of the input.
        num_output_features: channels of the output.
    """

    def __init__(self, num_input_features: int, num_output_features: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.conv = nn.Conv2d(num_input_features, num_output_features, 1, bias=False)

    @classmethod
    def from_layers(cls, norm: nn.BatchNorm2d, conv: nn.Conv2d) -> Transition:
        """Builds the transition around a norm and a 1x1 convolution that exist."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.norm = norm
        module.conv = conv
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, num_output_features, H // 2, W // 2]."""
        if is_synchronized(self.norm):
            return F.conv2d(F.avg_pool2d(F.relu(apply_norm(self.norm, x)), 2), self.conv.weight)
        out = transition(
            x,
            _norm_conv(self.norm, self.conv),
            training=_uses_batch(self.norm),
            momentum=_momentum([self.norm]),
            eps=self.norm.eps,
        )
        _count_batch([self.norm])
        return out


def _pairs(layer: Any) -> list[tuple[nn.BatchNorm2d, nn.Conv2d]]:
    pairs = [(layer.norm1, layer.conv1)]
    if hasattr(layer, "conv2"):
        pairs.append((layer.norm2, layer.conv2))
    return pairs


def _drop_rate(layer: Any) -> float:
    return getattr(layer, "drop_rate", 0.0)


def _run(layers: Sequence[Any], x: Tensor, memory: str) -> Tensor:
    """The block's output, by the fused op where all batch norms work alike."""
    norms = [norm for layer in layers for norm, _ in _pairs(layer)]
    if any(is_synchronized(norm) for norm in norms):
        return _run_plain(layers, x)
    modes = {(_uses_batch(norm), norm.momentum, norm.eps) for norm in norms}
    rates = [_drop_rate(layer) for layer in layers]
    dropouts = {
        (rate, layer.training or rate == 0) for layer, rate in zip(layers, rates, strict=True)
    }
    if len(modes) > 1 or len(dropouts) > 1 or any(norm.weight is None for norm in norms):
        return _run_plain(layers, x)
    ((training, _, eps),) = modes
    ((drop_rate, drops),) = dropouts
    if drop_rate > 0 and drops != training:
        return _run_plain(layers, x)
    out = dense_block(
        x,
        [[_norm_conv(norm, conv) for norm, conv in _pairs(layer)] for layer in layers],
        training=training,
        momentum=_momentum(norms),
        eps=eps,
        dropout=drop_rate if training else 0.0,
        memory=memory,
    )
    _count_batch(norms)
    return out


def _uses_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether the norm takes its statistics from the batch."""
    return norm.training or norm.running_mean is None


def _norm_conv(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> NormConv:
    # In evaluation the statistics of a norm that keeps running ones must not move.
    tracks = norm.training or not _uses_batch(norm)
    mean, variance = (norm.running_mean, norm.running_var) if tracks else (None, None)
    return NormConv(norm.weight, norm.bias, mean, variance, conv.weight)


def _counters(norms: Sequence[nn.BatchNorm2d]) -> list[Tensor]:
    return [
        norm.num_batches_tracked
        for norm in norms
        if norm.training and norm.num_batches_tracked is not None
    ]


def _momentum(norms: Sequence[nn.BatchNorm2d]) -> float:
    """The factor of the batch's statistics: the norms' momentum; without one, of a plain mean."""
    momentum, counters = norms[0].momentum, _counters(norms)
    if momentum is not None:
        return momentum
    return 1.0 / (float(counters[0]) + 1.0) if counters else 0.0


def _count_batch(norms: Sequence[nn.BatchNorm2d]) -> None:
    """Counts the batch, as nn.BatchNorm2d does."""
    counters = _counters(norms)
    if counters:
        torch._foreach_add_(counters, 1)


def _run_plain(layers: Sequence[Any], x: Tensor) -> Tensor:
    for layer in layers:
        new = x
        for norm, conv in _pairs(layer):
            new = conv(F.relu(apply_norm(norm, new)))
        x = torch.cat([x, F.dropout(new, _drop_rate(layer), layer.training)], 1)
    return x
