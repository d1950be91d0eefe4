"""A forward and backward pass of every op, from a seed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkernels
from dlkernels import ops
from dlkernels.boxes.anchors import AnchorGrid

CHANNELS = 16


class Conv3x3(nn.Conv2d):
    """A convolution that runs the op whether or not it pays."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ops.conv3x3(input, weight, bias)


class ASFFOfOneMap(nn.Module):
    """ASFF of a map and of its averages over 2 x 2 and 4 x 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = dlkernels.nn.ASFF(1, (CHANNELS,) * 3, out_channels=CHANNELS, weight_channels=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(*(F.avg_pool2d(x, size) for size in (4, 2)), x)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "SqueezeExcite": lambda: dlkernels.nn.SqueezeExcite(CHANNELS, 4),
    "BatchNormAct2d": lambda: dlkernels.nn.BatchNormAct2d(CHANNELS, activation="silu"),
    "Conv3x3": lambda: Conv3x3(CHANNELS, CHANNELS, 3, padding=1),
    "DepthwiseConvBNAct": lambda: dlkernels.nn.DepthwiseConvBNAct(CHANNELS, 3),
    "MBConv": lambda: dlkernels.nn.MBConv(CHANNELS, CHANNELS, 32, squeeze_channels=4),
    "ResidualBlock": lambda: dlkernels.nn.ResidualBlock(
        CHANNELS, 32, 8, 2, squeeze_channels=4, squeeze_place="before_last"
    ),
    "SEResidualBlock": lambda: dlkernels.nn.ResidualBlock(CHANNELS, CHANNELS, squeeze_channels=4),
    "DenseBlock": lambda: dlkernels.nn.DenseBlock(2, CHANNELS, 2, 4),
    "Transition": lambda: dlkernels.nn.Transition(CHANNELS, 8),
    "ASFF": ASFFOfOneMap,
}


def make_module(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODULES[name]()


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of a training step."""
    x = x.clone().requires_grad_()
    out = module(x)
    out.square().sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [out.detach(), x.grad, *gradients, *(buffer.clone() for buffer in module.buffers())]


def run_asff_fuse(generator: torch.Generator) -> list[Tensor]:
    inputs = [
        torch.randn(2, channels, size, size, generator=generator, requires_grad=True)
        for channels, size in ((CHANNELS, 8), (CHANNELS, 16), (2, 16))
    ]
    out = ops.asff_fuse(inputs[:-1], inputs[-1])
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


def run_pointwise_conv(generator: torch.Generator) -> list[Tensor]:
    raw = torch.randn(2, CHANNELS, 12, 12, generator=generator)
    norm = ops.Norm(mean=torch.zeros(CHANNELS), var=torch.ones(CHANNELS), activation="silu")
    made = ops.batch_norm_act(raw, *norm[:4], eps=norm.eps, activation=norm.activation).out
    x, weight, gate = inputs = [
        made.requires_grad_(),
        torch.randn(24, CHANNELS, generator=generator, requires_grad=True),
        torch.rand(2, CHANNELS, generator=generator, requires_grad=True),
    ]
    out = ops.pointwise_conv(x, weight, gate, ops.Source(raw, norm))
    out.square().sum().backward()
    return [out.detach(), *(tensor.grad for tensor in inputs)]


def run_pyramid_pool(generator: torch.Generator) -> list[Tensor]:
    x = torch.randn(2, CHANNELS, 13, 9, generator=generator, requires_grad=True)
    out = ops.pyramid_pool(x)
    out.square().sum().backward()
    return [out.detach(), x.grad]


def random_boxes(*shape: int, generator: torch.Generator) -> Tensor:
    corners = 100 * torch.rand(*shape, 2, generator=generator)
    return torch.cat([corners, corners + 50 * torch.rand(*shape, 2, generator=generator)], -1)


def run_atss_assign(generator: torch.Generator) -> list[Tensor]:
    grid = AnchorGrid.for_image((128, 128))
    return list(ops.atss_assign(grid, None, random_boxes(2, 9, generator=generator)))


def run_max_iou_assign(generator: torch.Generator) -> list[Tensor]:
    anchors = AnchorGrid.for_image((128, 128)).boxes()
    return list(ops.max_iou_assign(anchors, None, random_boxes(2, 9, generator=generator)))


def run_box_iou_loss(generator: torch.Generator) -> list[Tensor]:
    pred = random_boxes(500, generator=generator).requires_grad_()
    loss = ops.box_iou_loss(pred, random_boxes(500, generator=generator), "ciou")
    loss.sum().backward()
    return [loss.detach(), pred.grad]


def run_sigmoid_focal_loss(generator: torch.Generator) -> list[Tensor]:
    logits = torch.randn(300, 20, generator=generator, requires_grad=True)
    labels = torch.randint(-1, 20, (300,), generator=generator)
    loss = ops.sigmoid_focal_loss(logits, labels, reduction="sum")
    loss.backward()
    return [loss.detach(), logits.grad]


FUNCTIONS = {
    "asff_fuse": run_asff_fuse,
    "pointwise_conv": run_pointwise_conv,
    "pyramid_pool": run_pyramid_pool,
    "atss_assign": run_atss_assign,
    "max_iou_assign": run_max_iou_assign,
    "box_iou_loss": run_box_iou_loss,
    "sigmoid_focal_loss": run_sigmoid_focal_loss,
}
CALLS = [*MODULES, *FUNCTIONS]


def run(name: str, seed: int, module: nn.Module | None = None) -> list[Tensor]:
    """What a module's or a function's forward and backward pass give.

    A module is made from the seed, unless it is given.
    """
    generator = torch.Generator().manual_seed(seed)
    if name in FUNCTIONS:
        return FUNCTIONS[name](generator)
    module = module or make_module(name, seed)
    return step(module, torch.randn(2, CHANNELS, 12, 12, generator=generator))


def equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
