"""The drop-in modules of every family."""

from dlkernels.asff.modules import ASFF
from dlkernels.squeeze_excite.modules import SqueezeExcite

__all__ = ["ASFF", "SqueezeExcite"]
