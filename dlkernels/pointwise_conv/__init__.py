"""1x1 convolutions of gated maps, and their gradients without a copy of the input."""
