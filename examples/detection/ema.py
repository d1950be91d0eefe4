"""A moving average of weights."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import nn


class MovingAverage:
    """A copy of a model whose weights and running statistics follow the model's slowly.

    Args:
        model: the model.
        decay: what the average keeps of itself at a step, once many steps are made.
        warm_up: steps in which the decay grows to about two thirds of that.
    """

    def __init__(self, model: nn.Module, decay: float, warm_up: int):
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warm_up = decay, warm_up

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average toward the model after its step ``step``, counted from 0."""
        decay = self.decay * (1 - math.exp(-(step + 1) / self.warm_up))
        state = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                average.lerp_(state[name], 1 - decay)
            else:
                average.copy_(state[name])
