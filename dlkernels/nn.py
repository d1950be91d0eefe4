"""The drop-in modules of every family."""

from dlkernels.squeeze_excite.modules import SqueezeExcite

__all__ = ["SqueezeExcite"]
