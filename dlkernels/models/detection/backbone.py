"""Any classification network as the source of a detector's maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models._utils import IntermediateLayerGetter

from dlkernels.models.densenet import DenseNet
from dlkernels.models.efficientnet import EfficientNet
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
    def of(cls, network: ResNet | SENet | DenseNet | EfficientNet) -> Backbone:
        """The backbone of a ResNet of torchvision or a network of dlkernels.

        The modules are shared with the network; its classifier is left out.

        Raises:
            TypeError: it is another network.
        """
        if isinstance(network, ResNet):
            stages = {f"layer{stage}": str(stage) for stage in (2, 3, 4)}
            body: nn.Module = IntermediateLayerGetter(network, stages)
        elif isinstance(network, SENet | DenseNet | EfficientNet):
            body = _Stages(network)
        else:
            raise TypeError(
                "network must be a torchvision ResNet or a dlkernels SENet, DenseNet or "
                f"EfficientNet, but is {type(network).__name__}; other networks: "
                "Backbone(body, channels)"
            )
        return cls(body, _channels(body))

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
    """The stages of a network of dlkernels, without what follows the last map."""

    def __init__(self, network: SENet | DenseNet | EfficientNet):
        super().__init__()
        self.maps: Callable[[Any, Tensor], list[Tensor]] = type(network).forward_features
        self.deep_stem = getattr(network, "deep_stem", False)
        children = dict(network.named_children())
        if isinstance(network, EfficientNet):  # the last stage is for the classifier
            children["features"] = nn.Sequential(*list(network.features)[:-1], nn.Identity())
        for name, module in children.items():
            if name not in ("dropout", "fc", "classifier"):
                self.add_module(name, module)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.maps(self, x)


@torch.no_grad()
def _channels(body: nn.Module) -> list[int]:
    """Channels of the last three maps, from a small image."""
    training = [module for module in body.modules() if module.training]
    like = next(body.parameters())
    maps = body.eval()(like.new_zeros(1, 3, 64, 64))
    for module in training:
        module.training = True
    maps = list(maps.values() if isinstance(maps, Mapping) else maps)
    return [level.shape[1] for level in maps[-len(STRIDES) :]]
