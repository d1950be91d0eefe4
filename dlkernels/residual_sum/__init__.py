"""The end of a residual block: batch norm, squeeze-and-excitation, sum and ReLU in one pass."""
