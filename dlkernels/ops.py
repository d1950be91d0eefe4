"""The public functions of every family."""

from dlkernels.atss.op import atss_assign
from dlkernels.squeeze_excite.op import squeeze_excite

__all__ = ["atss_assign", "squeeze_excite"]
