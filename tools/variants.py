"""The variants of the wheel: which CUDA each is for, and which GPUs its code runs on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A wheel of its own.

    Attributes:
        name: the local part of the wheel's version.
        cuda: the release of the CUDA toolkit that builds it, or None.
        arch_list: like TORCH_CUDA_ARCH_LIST: every real architecture that torch's own wheels of
            that CUDA serve, and PTX of the newest for those to come.
    """

    name: str
    cuda: str | None = None
    arch_list: str = ""


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("cpu"),
        Variant("cu126", "12.6", "5.0;6.0;7.0;7.5;8.0;8.6;9.0+PTX"),
        Variant("cu128", "12.8", "7.0;7.5;8.0;8.6;9.0;10.0;12.0+PTX"),
        Variant("cu130", "13.0", "7.5;8.0;8.6;9.0;10.0;12.0+PTX"),
    )
}
