"""``nn.MBConv`` and ``nn.DepthwiseConvBNAct``, drop-ins for other libraries' blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlkernels import backend
from dlkernels.batch_norm_act.modules import (
    norm_act,
    statistics_of,
    update_running_statistics,
    values_per_channel,
)
from dlkernels.batch_norm_act.reference import activate
from dlkernels.batch_norm_act.sync import apply_norm, is_synchronized
from dlkernels.checks import check_choice
from dlkernels.excitation import ACTIVATIONS as SQUEEZE_ACTIVATIONS
from dlkernels.excitation import GATES
from dlkernels.mbconv.block import run_kernel
from dlkernels.mbconv.op import DepthwiseOutput, depthwise_conv_bn_act
from dlkernels.mbconv.reference import ACTIVATIONS, ConvNorm, Excitation, Norm
from dlkernels.parts import add_parts
from dlkernels.pointwise_conv.op import Source, pointwise_conv

SAME = "same"

# The parts of a block, in the order in which it applies them.
PARTS = (
    "expand",
    "expand_norm",
    "depthwise",
    "depthwise_norm",
    "squeeze",
    "excite",
    "project",
    "project_norm",
)


def torchvision_names(expands: bool, squeezes: bool) -> dict[str, str]:
    """Where torchvision's MBConv, and so its state dict, has each part."""
    names: dict[str, str] = {}
    index = 0
    if expands:
        names |= {"expand": "block.0.0", "expand_norm": "block.0.1"}
        index = 1
    names |= {"depthwise": f"block.{index}.0", "depthwise_norm": f"block.{index}.1"}
    if squeezes:
        index += 1
        names |= {"squeeze": f"block.{index}.fc1", "excite": f"block.{index}.fc2"}
    return names | {"project": f"block.{index + 1}.0", "project_norm": f"block.{index + 1}.1"}


def timm_names(expands: bool, squeezes: bool) -> dict[str, str]:
    """Where timm's InvertedResidual, or DepthwiseSeparableConv without expansion, has them."""
    if expands:
        names = {"expand": "conv_pw", "expand_norm": "bn1", "depthwise": "conv_dw"}
        names |= {"depthwise_norm": "bn2", "project": "conv_pwl", "project_norm": "bn3"}
    else:
        names = {"depthwise": "conv_dw", "depthwise_norm": "bn1"}
        names |= {"project": "conv_pw", "project_norm": "bn2"}
    if squeezes:
        names |= {"squeeze": "se.conv_reduce", "excite": "se.conv_expand"}
    return names


STYLES = {"torchvision": torchvision_names, "timm": timm_names}


def padding_of(conv: nn.Conv2d, x: Tensor, same: bool) -> tuple[int, int, int, int]:
    """The zeros left, right, above and below: the convolution's own, or TensorFlow's 'same'."""
    if not same:
        vertical, horizontal = (int(side) for side in conv.padding)
        return horizontal, horizontal, vertical, vertical
    size, stride = conv.kernel_size[0], conv.stride[0]

    def sides(extent: int) -> tuple[int, int]:
        total = max(0, (-(-extent // stride) - 1) * stride + size - extent)
        return total // 2, total - total // 2

    return *sides(x.shape[3]), *sides(x.shape[2])


def depthwise_conv(
    channels: int, size: int, stride: int, padding: int | str | None
) -> tuple[nn.Conv2d, bool]:
    """A depthwise convolution, and whether it is to pad as TensorFlow does."""
    if isinstance(padding, str):
        check_choice("padding", padding, (SAME,))
    zeros = padding if isinstance(padding, int) else size // 2
    conv = nn.Conv2d(channels, channels, size, stride, zeros, groups=channels, bias=False)
    return conv, padding == SAME


def norm_arguments(norm: nn.BatchNorm2d, activation: str) -> Norm:
    """What the op needs to know of a batch norm."""
    return Norm(norm.weight, norm.bias, *statistics_of(norm), norm.eps, activation)


class DepthwiseConvBNAct(nn.Module):
    """Depthwise convolution, batch norm and activation in one op.

    State-dict keys are those of ``nn.Sequential(conv, norm)``, and of torchvision's
    ``Conv2dNormActivation``: ``0.weight``, ``1.weight`` and so on. See
    :func:`dlkernels.ops.depthwise_conv_bn_act` for what is saved for backward.

    Args:
        channels: C.
        kernel_size: 3, 5 or 7.
        stride: 1 or 2.
        padding: zeros on each side, or ``"same"`` for TensorFlow's; None for half the kernel.
        activation: a name that :func:`dlkernels.ops.depthwise_conv_bn_act` knows.
        eps: of the batch norm.
        momentum: of the batch norm.

    Raises:
        ValueError: an unknown activation; sizes are checked when the module is called.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | str | None = None,
        *,
        activation: str = "silu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ):
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        conv, self.same_padding = depthwise_conv(channels, kernel_size, stride, padding)
        self.add_module("0", conv)
        self.add_module("1", nn.BatchNorm2d(channels, eps, momentum))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, C, H', W']."""
        conv, norm = self.get_submodule("0"), self.get_submodule("1")
        assert isinstance(conv, nn.Conv2d)
        if is_synchronized(norm):
            raw = _plain_depthwise(conv, x, self.same_padding)
            return activate(apply_norm(norm, raw), self.activation, 0.0)
        assert isinstance(norm, nn.BatchNorm2d)
        result = depthwise_conv_bn_act(
            x,
            conv.weight,
            norm_arguments(norm, self.activation),
            stride=conv.stride[0],
            padding=padding_of(conv, x, self.same_padding),
        )
        count = values_per_channel(result.out)
        update_running_statistics(norm, result.mean, result.var, count)
        return result.out


class MBConv(nn.Module):
    """The inverted residual block with squeeze-and-excitation.

    Sandler et al., "MobileNetV2" (2018), figure 3; Tan and Le, "EfficientNet" (2019), section 4:
    expansion by a 1x1 convolution, depthwise convolution, squeeze-and-excitation, projection by a
    1x1 convolution, each convolution followed by a batch norm; the sum with the input where shapes
    allow it, under stochastic depth.

    Of maps, backward keeps the input and the raw outputs of expansion, depthwise convolution and
    projection; what batch norms and activations make of them is computed again. Batch norms are
    folded on the fly, so that nothing can be stale after a parameter or buffer has changed. In
    evaluation without gradients the block is one op on CPUs, :func:`dlkernels.ops.mbconv_block`. A
    block with ``nn.SyncBatchNorm`` runs layer by layer in plain PyTorch.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        expand_channels: channels of the depthwise convolution; if they are those of the input,
            there is no expansion.
        kernel_size: 3, 5 or 7.
        stride: 1 or 2.
        squeeze_channels: hidden channels of squeeze-and-excitation; None for none.
        activation: after expansion and depthwise convolution.
        squeeze_activation: inside squeeze-and-excitation.
        gate: ``"sigmoid"`` or ``"hard_sigmoid"``.
        drop_path: probability that stochastic depth drops a sample's residual.
        padding: of the depthwise convolution, as in :class:`DepthwiseConvBNAct`.
        eps: of the batch norms.
        momentum: of the batch norms.
        style: the names of the parameters, ``"torchvision"`` or ``"timm"``.

    Raises:
        ValueError: an unknown name; sizes are checked when the module is called.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expand_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        squeeze_channels: int | None = None,
        activation: str = "silu",
        squeeze_activation: str = "silu",
        gate: str = "sigmoid",
        drop_path: float = 0.0,
        padding: int | str | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        style: str = "torchvision",
    ):
        super().__init__()
        check_choice("style", style, STYLES)
        middle = expand_channels
        parts: dict[str, nn.Module] = {}
        if middle != in_channels:
            parts["expand"] = nn.Conv2d(in_channels, middle, 1, bias=False)
            parts["expand_norm"] = nn.BatchNorm2d(middle, eps, momentum)
        parts["depthwise"], same = depthwise_conv(middle, kernel_size, stride, padding)
        parts["depthwise_norm"] = nn.BatchNorm2d(middle, eps, momentum)
        if squeeze_channels is not None:
            parts["squeeze"] = nn.Conv2d(middle, squeeze_channels, 1)
            parts["excite"] = nn.Conv2d(squeeze_channels, middle, 1)
        parts["project"] = nn.Conv2d(middle, out_channels, 1, bias=False)
        parts["project_norm"] = nn.BatchNorm2d(out_channels, eps, momentum)
        self._adopt(
            parts,
            STYLES[style]("expand" in parts, "squeeze" in parts),
            residual=stride == 1 and in_channels == out_channels,
            activation=activation,
            squeeze_activation=squeeze_activation,
            gate=gate,
            drop_path=drop_path,
            same_padding=same,
        )

    @classmethod
    def from_parts(
        cls,
        parts: Mapping[str, nn.Module],
        names: Mapping[str, str],
        *,
        residual: bool,
        activation: str,
        squeeze_activation: str = "relu",
        gate: str = "sigmoid",
        drop_path: float = 0.0,
        same_padding: bool = False,
    ) -> MBConv:
        """Builds the block around layers that exist, which keep their names and parameters.

        Args:
            parts: for each of the block's parts, see ``PARTS``, its layer; expansion and
                squeeze-and-excitation may be missing.
            names: for each part its name in the block, with dots where it lies deeper.
            residual: whether the input is added.
            activation: as in the constructor.
            squeeze_activation: as in the constructor.
            gate: as in the constructor.
            drop_path: as in the constructor.
            same_padding: whether the depthwise convolution pads as TensorFlow does.
        """
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block._adopt(
            parts,
            names,
            residual=residual,
            activation=activation,
            squeeze_activation=squeeze_activation,
            gate=gate,
            drop_path=drop_path,
            same_padding=same_padding,
        )
        return block

    def _adopt(
        self,
        parts: Mapping[str, nn.Module],
        names: Mapping[str, str],
        *,
        residual: bool,
        activation: str,
        squeeze_activation: str,
        gate: str,
        drop_path: float,
        same_padding: bool,
    ) -> None:
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("squeeze_activation", squeeze_activation, SQUEEZE_ACTIVATIONS)
        check_choice("gate", gate, GATES)
        self.names = {part: names[part] for part in PARTS if part in parts}
        self.residual = residual
        self.activation = activation
        self.squeeze_activation = squeeze_activation
        self.gate = gate
        self.drop_path = drop_path
        self.same_padding = same_padding
        add_parts(self, parts, self.names)

    def part(self, name: str) -> Any:
        """The layer that serves as this part, or None."""
        if name not in self.names:
            return None
        # As get_submodule, which a small block would spend much of its time in.
        module: nn.Module | None = self
        for key in self.names[name].split("."):
            assert module is not None
            module = module._modules[key]
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, O, H', W']."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        norms = [self.part(name) for name in self.names if name.endswith("_norm")]
        if any(map(is_synchronized, norms)):
            return self._run_plain(x)
        if self._is_constant(norms) and self._has_kernel(x):
            return self._infer(x)
        hidden = x
        before = None
        if "expand" in self.names:
            hidden = pointwise_conv(x, _matrix(self.part("expand"), x))
            before = norm_arguments(self.part("expand_norm"), self.activation)
        convolved = self._convolve(hidden, before)
        projected = self._project(convolved)
        residual = x if self.residual else None
        result = norm_act(self.part("project_norm"), projected, residual, self._sample_scale(x))
        # Last, so that a block that runs out of memory leaves them all as they were.
        self._update_statistics(convolved, hidden)
        return result.out

    def _run_plain(self, x: Tensor) -> Tensor:
        """The block layer by layer, for norms that take their statistics from all processes."""
        hidden = x
        if "expand" in self.names:
            raw = pointwise_conv(x, _matrix(self.part("expand"), x))
            hidden = activate(apply_norm(self.part("expand_norm"), raw), self.activation, 0.0)
        raw = _plain_depthwise(self.part("depthwise"), hidden, self.same_padding)
        hidden = activate(apply_norm(self.part("depthwise_norm"), raw), self.activation, 0.0)
        gate = self._gate(hidden.mean((2, 3)), x)
        projected = pointwise_conv(hidden, _matrix(self.part("project"), x), gate)
        out = apply_norm(self.part("project_norm"), projected)
        scale = self._sample_scale(x)
        if scale is not None:
            out = out * scale[:, None, None, None].to(out.dtype)
        return out + x if self.residual else out

    def _is_constant(self, norms: list[nn.BatchNorm2d]) -> bool:
        """Whether no statistics are the batch's and no gradient is recorded."""
        return not torch.is_grad_enabled() and all(
            statistics_of(norm)[0] is not None for norm in norms
        )

    def _has_kernel(self, x: Tensor) -> bool:
        """Whether a kernel runs the whole block; input that does not fit it is left to others."""
        if x.dim() != 4 or not backend.has_kernel("mbconv_block", x):
            return False
        conv = self.part("depthwise")
        channels = self.part("expand").in_channels if "expand" in self.names else conv.in_channels
        left, right, top, bottom = padding_of(conv, x, self.same_padding)
        smallest = min(x.shape[2] + top + bottom, x.shape[3] + left + right)
        weight = self.part("project").weight
        return (
            x.shape[1] == channels
            and min(x.shape[2:]) > 0
            and smallest >= conv.kernel_size[0]
            and weight.dtype in (x.dtype, torch.float32)
            and weight.device == x.device
        )

    def _infer(self, x: Tensor) -> Tensor:
        """The block in one op."""
        conv = self.part("depthwise")
        return run_kernel(
            x,
            self._layer("depthwise", self.activation),
            self._layer("project", "identity"),
            self._layer("expand", self.activation) if "expand" in self.names else None,
            self._excitation(),
            conv.stride[0],
            padding_of(conv, x, self.same_padding),
            self.residual,
        )

    def _layer(self, name: str, activation: str) -> ConvNorm:
        weight = self.part(name).weight
        if name != "depthwise":
            weight = weight.flatten(1)
        return ConvNorm(weight, norm_arguments(self.part(f"{name}_norm"), activation))

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

    def _convolve(self, hidden: Tensor, before: Norm | None) -> DepthwiseOutput:
        conv, norm = self.part("depthwise"), self.part("depthwise_norm")
        return depthwise_conv_bn_act(
            hidden,
            conv.weight,
            norm_arguments(norm, self.activation),
            before,
            stride=conv.stride[0],
            padding=padding_of(conv, hidden, self.same_padding),
            pool="squeeze" in self.names,
        )

    def _update_statistics(self, result: DepthwiseOutput, hidden: Tensor) -> None:
        """Of the norms after and before the depthwise convolution of ``hidden``."""
        update_running_statistics(
            self.part("depthwise_norm"), result.mean, result.var, values_per_channel(result.out)
        )
        if result.input_mean is not None and result.input_var is not None:
            update_running_statistics(
                self.part("expand_norm"),
                result.input_mean,
                result.input_var,
                values_per_channel(hidden),
            )

    def _project(self, convolved: DepthwiseOutput) -> Tensor:
        x = convolved.out
        gate = self._gate(convolved.pooled, x)
        weight = _matrix(self.part("project"), x)
        if convolved.raw is None or not torch.is_grad_enabled():
            return pointwise_conv(x, weight, gate)
        norm = self.part("depthwise_norm")
        recipe = Norm(
            norm.weight, norm.bias, convolved.mean, convolved.var, norm.eps, self.activation
        )
        return pointwise_conv(x, weight, gate, Source(convolved.raw, recipe))

    def _gate(self, pooled: Tensor | None, x: Tensor) -> Tensor | None:
        excitation = self._excitation()
        if excitation is None or pooled is None:
            return None
        return excitation.gates(pooled).to(x.dtype)

    def _sample_scale(self, x: Tensor) -> Tensor | None:
        """Stochastic depth: Huang et al. (2016), scaled so that the expected value stays."""
        if not self.residual or not self.training or self.drop_path == 0.0:
            return None
        keep = 1.0 - self.drop_path
        scale = torch.zeros(x.shape[0], device=x.device)
        return scale if keep == 0.0 else scale.bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """The options, as ``print(module)`` shows them."""
        return f"activation={self.activation}, residual={self.residual}, drop={self.drop_path}"


def _plain_depthwise(conv: nn.Conv2d, x: Tensor, same: bool) -> Tensor:
    padded = F.pad(x, padding_of(conv, x, same))
    return F.conv2d(padded, conv.weight.to(x.dtype), stride=conv.stride, groups=x.shape[1])


def _matrix(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The weight [O, C] of a 1x1 convolution, in the dtype of the maps."""
    return conv.weight.flatten(1).to(x.dtype)
