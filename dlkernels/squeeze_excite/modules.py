"""``nn.SqueezeExcite``, a drop-in for the squeeze-excite modules of other libraries."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from dlkernels.checks import check_choice
from dlkernels.squeeze_excite.op import squeeze_excite

# The names that other libraries give the two layers, and so the keys of their state dicts.
LAYER_NAMES = {
    "torchvision": ("fc1", "fc2"),
    "timm": ("conv_reduce", "conv_expand"),
    "selayer": ("fc.0", "fc.2"),
}


Layer = nn.Linear | nn.Conv2d


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018) in one fused op.

    See :func:`dlkernels.ops.squeeze_excite` for the formula and what is saved for backward.

    Args:
        channels: C, the channels of the input.
        squeeze_channels: R, the width of the hidden layer.
        activation: ``"relu"`` or ``"silu"``, after the first layer.
        gate: ``"sigmoid"`` or ``"hard_sigmoid"``.
        output_activation: ``"identity"`` or ``"relu"``, after the optional shortcut is added.
        bias: whether the two layers have biases.
        style: the names and shapes of the parameters. ``"torchvision"``: 1x1 convolutions fc1 and
            fc2, as in torchvision's SqueezeExcitation and timm's SEModule; ``"timm"``: 1x1
            convolutions conv_reduce and conv_expand, as in timm's SqueezeExcite; ``"selayer"``:
            linear layers fc.0 and fc.2, as in the classic SELayer(channel, reduction).

    Raises:
        ValueError: an unknown style; further names are checked when the module is called.
    """

    def __init__(
        self,
        channels: int,
        squeeze_channels: int,
        *,
        activation: str = "relu",
        gate: str = "sigmoid",
        output_activation: str = "identity",
        bias: bool = True,
        style: str = "torchvision",
    ):
        super().__init__()
        check_choice("style", style, LAYER_NAMES)
        reduce: Layer
        expand: Layer
        if style == "selayer":
            reduce = nn.Linear(channels, squeeze_channels, bias=bias)
            expand = nn.Linear(squeeze_channels, channels, bias=bias)
        else:
            reduce = nn.Conv2d(channels, squeeze_channels, 1, bias=bias)
            expand = nn.Conv2d(squeeze_channels, channels, 1, bias=bias)
        self._adopt(reduce, expand, LAYER_NAMES[style], activation, gate, output_activation)

    @classmethod
    def from_layers(
        cls,
        reduce: Layer,
        expand: Layer,
        names: tuple[str, str],
        *,
        activation: str = "relu",
        gate: str = "sigmoid",
        output_activation: str = "identity",
    ) -> SqueezeExcite:
        """Builds the module around two layers that exist, which keep their names and parameters.

        Args:
            reduce: linear layer or 1x1 convolution, C to R.
            expand: linear layer or 1x1 convolution, R to C.
            names: the two layers' names in the module; at most one dot each.
            activation: as in the constructor.
            gate: as in the constructor.
            output_activation: as in the constructor.
        """
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._adopt(reduce, expand, names, activation, gate, output_activation)
        return module

    def _adopt(
        self,
        reduce: Layer,
        expand: Layer,
        names: tuple[str, str],
        activation: str,
        gate: str,
        output_activation: str,
    ) -> None:
        self.names = names
        self.activation = activation
        self.gate = gate
        self.output_activation = output_activation
        for name, layer in zip(names, (reduce, expand), strict=True):
            parent, _, child = name.rpartition(".")
            if parent and not hasattr(self, parent):
                self.add_module(parent, nn.Module())
            self.get_submodule(parent).add_module(child, layer)

    @property
    def reduce(self) -> Layer:
        """The first layer, C to R."""
        return cast(Layer, self.get_submodule(self.names[0]))

    @property
    def expand(self) -> Layer:
        """The second layer, R to C."""
        return cast(Layer, self.get_submodule(self.names[1]))

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Scales ``x`` [N, C, H, W], adds ``shortcut`` if given, applies the output activation."""
        reduce, expand = self.reduce, self.expand
        return squeeze_excite(
            x,
            reduce.weight,
            reduce.bias,
            expand.weight,
            expand.bias,
            shortcut,
            activation=self.activation,
            gate=self.gate,
            output_activation=self.output_activation,
        )

    def extra_repr(self) -> str:
        """The options, as ``print(module)`` shows them."""
        return f"activation={self.activation}, gate={self.gate}, output={self.output_activation}"
