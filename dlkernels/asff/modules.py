"""``nn.ASFF``, the fusion module of YOLOv3-ASFF."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlkernels.asff.op import asff_fuse
from dlkernels.asff.reference import upsample
from dlkernels.checks import check_choice, check_maps, describe

# The name of each activation in the published code's blocks, and the activation.
ACTIVATIONS = {
    "leaky_relu": ("leaky", lambda: nn.LeakyReLU(0.1)),
    "relu6": ("relu6", lambda: nn.ReLU6(inplace=True)),
}


class ASFF(nn.Module):
    """Adaptively spatial feature fusion of a three-level pyramid at one of its levels.

    Liu, Huang and Wang, "Learning Spatial Fusion for Single-Shot Object Detection" (2019), section
    3. Every level is resized to the size and width of the module's level, a branch of 1x1
    convolutions predicts the softmax logits of each pixel, :func:`dlkernels.ops.asff_fuse` enlarges
    and fuses, and a 3x3 convolution follows. Levels count as in the published code, from 0, the
    coarsest, to 2 (the paper's levels 3 to 1); the state dict has that code's keys.

    Smaller levels are never enlarged before they are fused: the weight branch runs at each level's
    own resolution, in training too, and its batch norm's running statistics are those of the
    enlarged maps.

    Args:
        level: 0, 1 or 2, the level to fuse at.
        channels: widths of levels 0 to 2; the fused maps have that of ``level``.
        out_channels: width of the result; by default 1024, 512 or 256 as in the published networks.
        weight_channels: width of the weight branch at each level; published: 16, or 8 with RFB.
        activation: ``"leaky_relu"`` (slope 0.1) or ``"relu6"``, after every batch norm.
        return_weights: whether calls return the fusion weights, too.

    Raises:
        ValueError: an unknown level or activation, or not three widths.
    """

    def __init__(
        self,
        level: int,
        channels: Sequence[int] = (512, 256, 256),
        *,
        out_channels: int | None = None,
        weight_channels: int = 16,
        activation: str = "leaky_relu",
        return_weights: bool = False,
    ):
        super().__init__()
        if level not in (0, 1, 2):
            raise ValueError(f"level must be 0, 1 or 2, but is {level!r}")
        if len(channels) != 3:
            raise ValueError(f"channels must hold 3 widths, but is {channels!r}")
        check_choice("activation", activation, ACTIVATIONS)
        self.level = level
        self.channels = tuple(channels)
        self.return_weights = return_weights
        width = channels[level]

        def block(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Module:
            return _conv_block(in_channels, out_channels, kernel, stride, activation)

        for coarser in range(level):
            # The published code compresses level 0 always, level 1 where widths differ.
            if coarser == 0 or channels[coarser] != width:
                self.add_module(f"compress_level_{coarser}", block(channels[coarser], width, 1))
        for finer in range(level + 1, 3):
            self.add_module(f"stride_level_{finer}", block(channels[finer], width, 3, 2))
        for index in range(3):
            self.add_module(f"weight_level_{index}", block(width, weight_channels, 1))
        self.weight_levels = nn.Conv2d(3 * weight_channels, 3, 1)
        self.expand = block(width, out_channels or (1024, 512, 256)[level], 3)

    @classmethod
    def from_layers(
        cls, layers: Mapping[str, nn.Module], level: int, channels: Sequence[int]
    ) -> ASFF:
        """Builds the module around layers that exist, which keep their parameters.

        Args:
            layers: by their names in the state dict, each as the constructor makes it.
            level: as in the constructor.
            channels: as in the constructor.
        """
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.level = level
        module.channels = tuple(channels)
        module.return_weights = False
        for name, layer in layers.items():
            module.add_module(name, layer)
        return module

    def forward(
        self, level_0: Tensor, level_1: Tensor, level_2: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Fuses the pyramid.

        Args:
            level_0: the coarsest maps [N, channels[0], H, W].
            level_1: maps [N, channels[1], 2 H, 2 W].
            level_2: maps [N, channels[2], 4 H, 4 W].

        Returns:
            Maps [N, out_channels, h, w] in the size of the module's level; with ``return_weights``
            a pair of them and the fusion weights [N, 3, h, w], which sum to 1 over the levels.

        Raises:
            TypeError: a level is no floating-point tensor.
            ValueError: a level has another shape.
        """
        levels = (level_0, level_1, level_2)
        self._check(levels)
        with _statistics_kept_on_error(self):
            features = [self._resize(index, x) for index, x in enumerate(levels)]
            logits = self._logits(features)
            out = self.expand(asff_fuse(features, logits))
            return (out, torch.softmax(logits, 1)) if self.return_weights else out

    def _check(self, levels: Sequence[Tensor]) -> None:
        for index, (x, width) in enumerate(zip(levels, self.channels, strict=True)):
            name = f"level_{index}"
            check_maps(name, x)
            samples, _, height, columns = levels[0].shape
            shape = [samples, width, height << index, columns << index]
            if list(x.shape) != shape:
                raise ValueError(
                    f"{name} must have shape {shape} (channels {self.channels}, each level twice "
                    f"the size of the one before), but is {describe(x)}"
                )

    def _resize(self, index: int, x: Tensor) -> Tensor:
        """A level in the width of the module's and, unless it is smaller, in its size."""
        if index < self.level:
            name = f"compress_level_{index}"
            return self.get_submodule(name)(x) if hasattr(self, name) else x
        if index == self.level:
            return x
        if index - self.level == 2:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        return self.get_submodule(f"stride_level_{index}")(x)

    def _logits(self, features: Sequence[Tensor]) -> Tensor:
        """The softmax logits [N, 3, h, w].

        A 1x1 convolution of concatenated maps is the sum of those of its parts, and commutes with
        nearest upsampling, so that only three channels are ever enlarged.
        """
        height = features[self.level].shape[2]
        weights = self.weight_levels.weight.chunk(3, dim=1)
        logits = cast(Tensor, self.weight_levels.bias).view(1, 3, 1, 1)
        for index, (x, weight) in enumerate(zip(features, weights, strict=True)):
            block = cast(nn.Sequential, self.get_submodule(f"weight_level_{index}"))
            factor = height // x.shape[2]
            if isinstance(block.get_submodule("batch_norm"), nn.BatchNorm2d):
                part = F.conv2d(_run_repeated(block, x, factor * factor), weight)
                logits = logits + upsample(part, factor, "nearest")
            else:  # a norm put in its place, such as SyncBatchNorm: who knows what it counts
                logits = logits + F.conv2d(block(upsample(x, factor, "nearest")), weight)
        return logits

    def extra_repr(self) -> str:
        """The options, as ``print(module)`` shows them."""
        return f"level={self.level}, channels={self.channels}"


def _conv_block(
    in_channels: int, out_channels: int, kernel: int, stride: int, activation: str
) -> nn.Sequential:
    name, make = ACTIVATIONS[activation]
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(
        OrderedDict([("conv", conv), ("batch_norm", nn.BatchNorm2d(out_channels)), (name, make())])
    )


@contextmanager
def _statistics_kept_on_error(module: nn.Module) -> Iterator[None]:
    """Restores running statistics after an error, such as memory that runs out after some norms."""
    norms = [norm for norm in module.modules() if norm.training and isinstance(norm, _BatchNorm)]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    except RuntimeError:
        for buffer, before in buffers:
            buffer.copy_(before)
        raise


# ---- batch norm at the resolution before upsampling ----------------------------------------------


def _run_repeated(block: nn.Sequential, x: Tensor, repeats: int) -> Tensor:
    """The block's result, and running statistics as if every pixel were there ``repeats`` times."""
    conv, norm, activation = block
    return activation(_batch_norm_repeated(cast(nn.BatchNorm2d, norm), conv(x), repeats))


def _batch_norm_repeated(norm: nn.BatchNorm2d, x: Tensor, repeats: int) -> Tensor:
    """``norm(x)``, its running statistics updated as if every pixel were there ``repeats`` times.

    Repetition changes neither mean nor biased variance, but the running variance is unbiased: it is
    n / (n - 1) times the biased one of n values.
    """
    if repeats == 1 or not norm.training or not norm.track_running_stats:
        return norm(x)
    batches, running_mean, running_variance = (
        cast(Tensor, buffer)
        for buffer in (norm.num_batches_tracked, norm.running_mean, norm.running_var)
    )
    mean, variance = torch.zeros_like(running_mean), torch.zeros_like(running_variance)
    out = F.batch_norm(x, mean, variance, norm.weight, norm.bias, True, 1.0, norm.eps)
    count = x.numel() // x.shape[1]
    repeated = count * repeats
    variance = variance * ((count - 1) / count * repeated / (repeated - 1))
    # As in torch, without a momentum all batches count alike.
    momentum: Any = (1 / (batches + 1)).to(mean) if norm.momentum is None else norm.momentum
    batches += 1
    running_mean.lerp_(mean, momentum)
    running_variance.lerp_(variance, momentum)
    return out
