"""The public functions of every family."""

from dlkernels.squeeze_excite.op import squeeze_excite

__all__ = ["squeeze_excite"]
