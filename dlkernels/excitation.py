"""Squeeze-and-excitation of pooled maps: its two small layers, for ops that do more than them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dlkernels.checks import check_choice, check_parameter, describe

ACTIVATIONS = ("relu", "silu")
GATES = ("sigmoid", "hard_sigmoid")


class Excitation(NamedTuple):
    """Squeeze-and-excitation of C channels: Hu et al. (2018), section 3.

    Attributes:
        squeeze_weight: [S, C].
        squeeze_bias: [S] or None.
        excite_weight: [C, S].
        excite_bias: [C] or None.
        activation: ``"relu"`` or ``"silu"``, between the two.
        gate: ``"sigmoid"`` or ``"hard_sigmoid"``.
    """

    squeeze_weight: Tensor
    squeeze_bias: Tensor | None
    excite_weight: Tensor
    excite_bias: Tensor | None
    activation: str = "silu"
    gate: str = "sigmoid"

    def to(self, dtype: torch.dtype) -> Excitation:
        """The same with tensors of that dtype."""
        return self._replace(
            squeeze_weight=self.squeeze_weight.to(dtype),
            squeeze_bias=None if self.squeeze_bias is None else self.squeeze_bias.to(dtype),
            excite_weight=self.excite_weight.to(dtype),
            excite_bias=None if self.excite_bias is None else self.excite_bias.to(dtype),
        )

    def gates(self, pooled: Tensor) -> Tensor:
        """A factor for each channel of pooled maps [N, C]."""
        return self.gates_of_hidden(self.hidden(pooled))

    def hidden(self, pooled: Tensor) -> Tensor:
        """The first layer, before its activation, [N, S]."""
        return F.linear(pooled, self.squeeze_weight, self.squeeze_bias)

    def gates_of_hidden(self, hidden: Tensor) -> Tensor:
        """The second layer and the gate, [N, C]."""
        gate = F.sigmoid if self.gate == "sigmoid" else F.hardsigmoid
        return gate(F.linear(self._activate(hidden), self.excite_weight, self.excite_bias))

    def gradients(
        self, grad: Tensor, pooled: Tensor, hidden: Tensor, gates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of ``pooled`` and the four tensors, from that of ``gates``."""
        if self.gate == "sigmoid":
            grad_logits = grad * gates * (1 - gates)
        else:
            grad_logits = torch.where((gates > 0) & (gates < 1), grad / 6, 0)
        grad_activated = grad_logits @ self.excite_weight
        if self.activation == "relu":
            grad_hidden = torch.where(hidden > 0, grad_activated, 0)
        else:
            sigmoid = hidden.sigmoid()
            grad_hidden = grad_activated * sigmoid * (1 + hidden * (1 - sigmoid))
        return (
            grad_hidden @ self.squeeze_weight,
            grad_hidden.t() @ pooled,
            grad_hidden.sum(0),
            grad_logits.t() @ self._activate(hidden),
            grad_logits.sum(0),
        )

    def _activate(self, hidden: Tensor) -> Tensor:
        return F.relu(hidden) if self.activation == "relu" else F.silu(hidden)


def check_excitation(excitation: Any, channels: int, x: Tensor) -> None:
    """``excitation`` fits maps of that many channels, of the dtype and on the device of ``x``.

    Raises:
        TypeError: it is no Excitation, or a tensor has another dtype.
        ValueError: a shape or a device does not fit, or a name is unknown.
    """
    if not isinstance(excitation, Excitation):
        raise TypeError(
            f"excitation must be an Excitation or None, but is {type(excitation).__name__}"
        )
    squeeze_weight, squeeze_bias, excite_weight, excite_bias, activation, gate = excitation
    check_choice("excitation.activation", activation, ACTIVATIONS)
    check_choice("excitation.gate", gate, GATES)
    check_parameter("excitation.squeeze_weight", squeeze_weight, x)
    hidden = squeeze_weight.shape[0] if squeeze_weight.dim() == 2 else -1
    shapes: dict[str, tuple[Any, list[int]]] = {
        "squeeze_weight": (squeeze_weight, [hidden, channels]),
        "squeeze_bias": (squeeze_bias, [hidden]),
        "excite_weight": (excite_weight, [channels, hidden]),
        "excite_bias": (excite_bias, [channels]),
    }
    for name, (value, shape) in shapes.items():
        if value is None and name.endswith("bias"):
            continue
        check_parameter(f"excitation.{name}", value, x)
        if list(value.shape) != shape:
            raise ValueError(
                f"excitation.{name} must have shape {shape} for maps of {channels} channels, but "
                f"is {describe(value)}"
            )
