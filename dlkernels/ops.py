"""The public functions of every family."""

from dlkernels.asff.op import asff_fuse
from dlkernels.squeeze_excite.op import squeeze_excite

__all__ = ["asff_fuse", "squeeze_excite"]
