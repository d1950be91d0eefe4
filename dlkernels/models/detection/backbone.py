"""Any classification network as the source of a detector's maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models._utils import IntermediateLayerGetter

from dlkernels.models.senet import SENet

STRIDES = (8, 16, 32)


class Backbone(nn.Module):
    """Gives a network's maps at 1/8, 1/16 and 1/32 of the image's size.

    Args:
        body: a module that turns images [N, 3, H, W] into a sequence or a dict of maps, of which
            the last three have these sizes; timm's ``features_only=True`` makes such modules.
        channels: of the three maps.

    Raises:
        ValueError: there are not three numbers of channels.
    """

    def __init__(self, body: nn.Module, channels: Sequence[int]):
        super().__init__()
        if len(channels) != len(STRIDES):
            raise ValueError(f"channels must be those of three maps, but is {tuple(channels)}")
        self.body = body
        self.channels = tuple(channels)

    @classmethod
    def of(cls, network: ResNet | SENet) -> Backbone:
        """The backbone of a ResNet of torchvision or an SE network of dlkernels.

        The modules are shared with the network; its classifier is left out.

        Raises:
            TypeError: it is another network.
        """
        if isinstance(network, ResNet):
            stages = {f"layer{stage}": str(stage) for stage in (2, 3, 4)}
            body: nn.Module = IntermediateLayerGetter(network, stages)
        elif isinstance(network, SENet):
            body = _Stages(network)
        else:
            raise TypeError(
                "network must be a torchvision ResNet or a dlkernels SENet, but is "
                f"{type(network).__name__}; other networks: Backbone(body, channels)"
            )
        last = network.fc.in_features
        return cls(body, (last // 4, last // 2, last))

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps of images [N, 3, H, W], the finest first.

        Raises:
            ValueError: the body's maps are not those that the class asks for.
        """
        maps = self.body(images)
        maps = list(maps.values() if isinstance(maps, Mapping) else maps)[-len(STRIDES) :]
        if len(maps) < len(STRIDES):
            raise ValueError(f"the body must give at least three maps, but gives {len(maps)}")
        for level, stride in zip(maps, STRIDES, strict=True):
            expected = [-(-side // stride) for side in images.shape[-2:]]
            if list(level.shape[-2:]) != expected:
                raise ValueError(
                    f"the body's maps must be at 1/8, 1/16 and 1/32 of the images' size, but one "
                    f"is {list(level.shape[-2:])} for {list(images.shape[-2:])}"
                )
        return maps


class _Stages(nn.Module):
    """The stages of an SE network, without its classifier."""

    def __init__(self, network: SENet):
        super().__init__()
        self.deep_stem = network.deep_stem
        for name, module in network.named_children():
            if name not in ("dropout", "fc"):
                self.add_module(name, module)

    forward = SENet.forward_features
