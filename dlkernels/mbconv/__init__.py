"""The inverted residual block: depthwise convolution between batch norms, and its projection."""
