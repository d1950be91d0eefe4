"""``nn.ResidualBlock``, a drop-in for the blocks of ResNets, RegNets and SENets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlkernels.batch_norm_act.modules import (
    statistics_of,
    update_running_statistics,
    values_per_channel,
)
from dlkernels.batch_norm_act.op import batch_norm_act
from dlkernels.batch_norm_act.reference import ACTIVATIONS, Norm, activate
from dlkernels.batch_norm_act.sync import apply_norm, is_synchronized
from dlkernels.checks import check_choice
from dlkernels.excitation import ACTIVATIONS as SQUEEZE_ACTIVATIONS
from dlkernels.excitation import GATES, Excitation
from dlkernels.parts import add_parts
from dlkernels.residual_block.convolution import Recipe, convolve
from dlkernels.residual_sum.op import residual_sum
from dlkernels.residual_sum.reference import ACTIVATIONS as OUTPUT_ACTIVATIONS

# Each convolution and its norm.
LAYERS = (("conv1", "norm1"), ("conv2", "norm2"), ("conv3", "norm3"))
# Where squeeze-and-excitation stands: after the last norm, as in SENets, or before the last
# convolution, as in RegNets.
PLACES = ("last", "before_last")

# The parts of a block and what a style calls them, in the order in which it registers them.
STYLES = {
    "resnet": {
        "conv1": "conv1",
        "norm1": "bn1",
        "conv2": "conv2",
        "norm2": "bn2",
        "conv3": "conv3",
        "norm3": "bn3",
        "squeeze": "se.fc1",
        "excite": "se.fc2",
        "shortcut": "downsample",
    },
    "regnet": {
        "shortcut": "proj",
        "conv1": "f.a.0",
        "norm1": "f.a.1",
        "conv2": "f.b.0",
        "norm2": "f.b.1",
        "squeeze": "f.se.fc1",
        "excite": "f.se.fc2",
        "conv3": "f.c.0",
        "norm3": "f.c.1",
    },
}


class _Statistics(NamedTuple):
    """What a norm normalised with, for its running statistics."""

    norm: nn.BatchNorm2d
    mean: Tensor
    var: Tensor
    values: int

    def update(self) -> None:
        update_running_statistics(*self)


class ResidualBlock(nn.Module):
    """The residual block of ResNets, ResNeXts, RegNets and SENets.

    He et al., "Deep Residual Learning" (2016), figure 5; Xie et al., "Aggregated Residual
    Transformations" (2017); Hu, Shen and Sun, "Squeeze-and-Excitation Networks" (2018), figure 3;
    Radosavovic et al., "Designing Network Design Spaces" (2020), figure 4: two or three
    convolutions, each followed by a batch norm, with activations between them, optionally
    squeeze-and-excitation, the sum with a shortcut, and a ReLU.

    Of maps, backward keeps the input, the raw output of each convolution and, for the ReLU, the
    output, which the next block keeps anyway; what norms and activations make of them is computed
    again. The norm of the last convolution, squeeze-and-excitation after it, sum and ReLU are one
    op, :func:`dlkernels.ops.residual_sum`. 3x3 convolutions run
    :func:`dlkernels.ops.conv3x3` where :class:`dlkernels.nn.Conv2d` does. A block with
    ``nn.SyncBatchNorm`` runs layer by layer in plain PyTorch.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        hidden_channels: of the 3x3 convolution between two of 1x1; None for two 3x3 convolutions.
        stride: of the 3x3 convolution, or the first of two.
        groups: of the 3x3 convolution between two of 1x1.
        squeeze_channels: hidden channels of squeeze-and-excitation; None for none.
        squeeze_place: ``"last"``, after the last norm, or ``"before_last"``, before the last
            convolution.
        activation: between the convolutions.
        output_activation: after the sum, ``"relu"`` or ``"identity"``.
        squeeze_activation: inside squeeze-and-excitation, ``"relu"`` or ``"silu"``.
        gate: ``"sigmoid"`` or ``"hard_sigmoid"``.
        eps: of the batch norms.
        momentum: of the batch norms.
        style: the names of the parameters, ``"resnet"`` or torchvision's ``"regnet"``.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int | None = None,
        stride: int = 1,
        groups: int = 1,
        *,
        squeeze_channels: int | None = None,
        squeeze_place: str = "last",
        activation: str = "relu",
        output_activation: str = "relu",
        squeeze_activation: str = "relu",
        gate: str = "sigmoid",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        style: str = "resnet",
    ):
        super().__init__()
        check_choice("style", style, STYLES)
        if hidden_channels is None:
            layers = [
                _conv3x3(in_channels, out_channels, stride),
                _conv3x3(out_channels, out_channels),
            ]
        else:
            layers = [
                nn.Conv2d(in_channels, hidden_channels, 1, bias=False),
                _conv3x3(hidden_channels, hidden_channels, stride, groups),
                nn.Conv2d(hidden_channels, out_channels, 1, bias=False),
            ]
        parts: dict[str, nn.Module] = {}
        for (conv_name, norm_name), conv in zip(LAYERS, layers, strict=False):
            parts[conv_name] = conv
            parts[norm_name] = nn.BatchNorm2d(conv.out_channels, eps, momentum)
        if squeeze_channels is not None:
            channels = layers[-1 if squeeze_place == "last" else -2].out_channels
            parts["squeeze"] = nn.Conv2d(channels, squeeze_channels, 1)
            parts["excite"] = nn.Conv2d(squeeze_channels, channels, 1)
        if stride != 1 or in_channels != out_channels:
            parts["shortcut"] = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels, eps, momentum),
            )
        self._adopt(
            parts,
            STYLES[style],
            squeeze_place=squeeze_place,
            activation=activation,
            output_activation=output_activation,
            squeeze_activation=squeeze_activation,
            gate=gate,
        )

    @classmethod
    def from_parts(
        cls,
        parts: Mapping[str, nn.Module],
        names: Mapping[str, str],
        *,
        squeeze_place: str = "last",
        activation: str = "relu",
        output_activation: str = "relu",
        squeeze_activation: str = "relu",
        gate: str = "sigmoid",
    ) -> ResidualBlock:
        """Builds the block around layers that exist, which keep their names and parameters.

        Args:
            parts: for each of the block's parts, see ``STYLES``, its layer; the third convolution
                and its norm, squeeze-and-excitation and the shortcut may be missing. The shortcut
                is any module; the convolutions have no bias and pad with zeros.
            names: for each part its name in the block, with dots where it lies deeper; in this
                order the block registers them.
            squeeze_place: as in the constructor.
            activation: as in the constructor.
            output_activation: as in the constructor.
            squeeze_activation: as in the constructor.
            gate: as in the constructor.
        """
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block._adopt(
            parts,
            names,
            squeeze_place=squeeze_place,
            activation=activation,
            output_activation=output_activation,
            squeeze_activation=squeeze_activation,
            gate=gate,
        )
        return block

    def _adopt(
        self,
        parts: Mapping[str, nn.Module],
        names: Mapping[str, str],
        *,
        squeeze_place: str,
        activation: str,
        output_activation: str,
        squeeze_activation: str,
        gate: str,
    ) -> None:
        check_choice("squeeze_place", squeeze_place, PLACES)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("output_activation", output_activation, OUTPUT_ACTIVATIONS)
        check_choice("squeeze_activation", squeeze_activation, SQUEEZE_ACTIVATIONS)
        check_choice("gate", gate, GATES)
        self.names = {part: name for part, name in names.items() if part in parts}
        self.squeeze_place = squeeze_place
        self.activation = activation
        self.output_activation = output_activation
        self.squeeze_activation = squeeze_activation
        self.gate = gate
        add_parts(self, parts, self.names)

    def part(self, name: str) -> Any:
        """The layer that serves as this part, or None."""
        return self.get_submodule(self.names[name]) if name in self.names else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, O, H', W']."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        layers = [(self.part(c), self.part(n)) for c, n in LAYERS if c in self.names]
        if any(is_synchronized(norm) for _, norm in layers):
            return self._run_plain(x, layers)
        statistics: list[_Statistics] = []
        hidden, recipe = x, None
        for index, (conv, norm) in enumerate(layers[:-1]):
            raw = convolve(conv, hidden, recipe)
            excites = self.squeeze_place == "before_last" and index == len(layers) - 2
            hidden, recipe = self._normed(raw, norm, excites, statistics)
        conv, norm = layers[-1]
        raw = convolve(conv, hidden, recipe)
        del hidden, recipe
        excitation = self._excitation() if self.squeeze_place == "last" else None
        result = residual_sum(
            raw,
            self._shortcut(x, statistics),
            Norm(norm.weight, norm.bias, *statistics_of(norm), norm.eps),
            excitation,
            activation=self.output_activation,
        )
        statistics.append(_Statistics(norm, result.mean, result.var, values_per_channel(raw)))
        # Last, so that a block that runs out of memory leaves them all as they were.
        for settled in statistics:
            settled.update()
        return result.out

    def _normed(
        self, raw: Tensor, norm: nn.BatchNorm2d, excites: bool, statistics: list[_Statistics]
    ) -> tuple[Tensor, Recipe]:
        """Norm and activation of a convolution's output, and how to compute them again."""
        excitation = self._excitation() if excites else None
        given = statistics_of(norm)
        result = batch_norm_act(
            raw,
            norm.weight,
            norm.bias,
            *given,
            eps=norm.eps,
            activation=self.activation,
            pool=excitation is not None,
        )
        statistics.append(_Statistics(norm, result.mean, result.var, values_per_channel(raw)))
        gate = None
        if excitation is not None and result.pooled is not None:
            gate = excitation.to(raw.dtype).gates(result.pooled).to(raw.dtype)
        used = Norm(norm.weight, norm.bias, result.mean, result.var, norm.eps, self.activation)
        return result.out, Recipe(raw, used, gate)

    def _excitation(self) -> Excitation | None:
        if "squeeze" not in self.names:
            return None
        squeeze, excite = self.part("squeeze"), self.part("excite")
        return Excitation(
            squeeze.weight.flatten(1),
            squeeze.bias,
            excite.weight.flatten(1),
            excite.bias,
            self.squeeze_activation,
            self.gate,
        )

    def _shortcut(self, x: Tensor, statistics: list[_Statistics]) -> Tensor:
        """The shortcut; a norm that ends a sequence has its running statistics updated later."""
        module = self.part("shortcut")
        if module is None:
            return x
        *layers, norm = module.children() if type(module) is nn.Sequential else [module]
        if type(norm) is not nn.BatchNorm2d:
            return module(x)
        for layer in layers:
            x = convolve(layer, x) if _is_plain(layer) else layer(x)  # type: ignore[arg-type]
        result = batch_norm_act(x, norm.weight, norm.bias, *statistics_of(norm), eps=norm.eps)
        statistics.append(_Statistics(norm, result.mean, result.var, values_per_channel(x)))
        return result.out

    def _run_plain(self, x: Tensor, layers: list[tuple[nn.Conv2d, nn.Module]]) -> Tensor:
        """The block layer by layer, for norms that take their statistics from all processes."""
        hidden = x
        for index, (conv, norm) in enumerate(layers):
            rest = len(layers) - 1 - index
            hidden = apply_norm(norm, convolve(conv, hidden))
            if rest > 0:
                hidden = activate(hidden, self.activation, 0.01)
            excitation = self._excitation()
            if excitation is not None and rest == PLACES.index(self.squeeze_place):
                gates = excitation.to(hidden.dtype).gates(hidden.mean((2, 3)))
                hidden = hidden * gates[:, :, None, None]
        module = self.part("shortcut")
        shortcut = x if module is None else _run_sequence(module, x)
        return OUTPUT_ACTIVATIONS[self.output_activation](hidden + shortcut)

    def extra_repr(self) -> str:
        """The options, as ``print(module)`` shows them."""
        return f"activation={self.activation}, output={self.output_activation}"


def _run_sequence(module: nn.Module, x: Tensor) -> Tensor:
    """The shortcut, in which ``nn.SyncBatchNorm`` runs on any device."""
    for layer in module.children() if type(module) is nn.Sequential else [module]:
        x = apply_norm(layer, x) if is_synchronized(layer) else layer(x)
    return x


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer is a convolution without a bias that pads with zeros."""
    is_conv = type(layer) is nn.Conv2d and layer.bias is None and layer.padding_mode == "zeros"
    return is_conv and not isinstance(layer.padding, str)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups, bias=False)
