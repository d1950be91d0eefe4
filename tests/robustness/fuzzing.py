"""Strategies for hypothesis: calls of every op, and calls of which one argument was changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dlkernels import ops
from dlkernels.boxes.anchors import AnchorGrid
from tests.robustness.calls import random_boxes

ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish", "mish")
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])

small = st.integers(1, 9)
channels = st.one_of(small, st.integers(10, 70))
flag = st.booleans()
seeds = st.integers(0, 2**16)


@dataclass
class Call:
    """A function and its arguments; what was changed in them, if anything."""

    name: str
    arguments: dict[str, Any]
    change: str = "nothing"

    def __call__(self) -> Any:
        return getattr(ops, self.name)(**self.arguments)

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={brief(value)}" for key, value in self.arguments.items())
        return f"ops.{self.name}({shown}), changed: {self.change}"


def brief(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = f"{value.dtype}".removeprefix("torch.")
        strides = list(value.stride()) if value.layout == torch.strided else value.layout
        gradient = ", requires grad" if value.requires_grad else ""
        return f"<{list(value.shape)} {kind} {value.device} strides {strides}{gradient}>"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(brief, value))})"
    return repr(value)


# ---- tensors ------------------------------------------------------------------------------------


def in_other_order(tensor: Tensor) -> Tensor:
    """The same values, with the dimensions in reverse order in memory."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def in_wider_buffer(tensor: Tensor) -> Tensor:
    """The same values, apart from each other and not at the storage's beginning."""
    buffer = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
    buffer[..., 1::2] = tensor
    return buffer[..., 1::2]


def unaligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous, one element behind the storage's beginning."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    return buffer[1:].view(tensor.shape).copy_(tensor)


def channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda tensor: tensor,
    channels_last,
    channels_last,
    in_other_order,
    in_wider_buffer,
    unaligned,
]


@st.composite
def laid_out(draw, tensor: Tensor, gradient: bool | None = None):
    """The tensor in any layout, and with a gradient or not."""
    tensor = draw(st.sampled_from(LAYOUTS))(tensor.detach())
    return tensor.requires_grad_(draw(flag) if gradient is None else gradient)


@st.composite
def maps(draw, dtype: torch.dtype, shape: tuple[int, ...] | None = None):
    if shape is None:
        samples = draw(st.integers(0, 3))
        shape = (samples, draw(channels), draw(small), draw(small))
    return draw(laid_out((1.5 * torch.randn(shape) + 0.5).to(dtype)))


@st.composite
def values(draw, count: int, dtype: torch.dtype, *, positive: bool = False, gradient=None):
    """One value per channel, in the dtype or in float32."""
    tensor = torch.rand(count) + 0.5 if positive else torch.randn(count)
    return draw(laid_out(tensor.to(draw(st.sampled_from([dtype, torch.float32]))), gradient))


# ---- valid calls --------------------------------------------------------------------------------


@st.composite
def squeeze_excite(draw):
    torch.manual_seed(draw(seeds))
    dtype = draw(DTYPES)
    x = draw(maps(dtype))
    count, squeezed = x.shape[1], draw(small)
    as_conv = (1, 1) if draw(flag) else ()

    def tensor(*shape: int) -> Tensor:
        return draw(laid_out((torch.randn(shape) / max(1, shape[-1]) ** 0.5).to(dtype)))

    reduce_weight, expand_weight = torch.randn(squeezed, count), torch.randn(count, squeezed)
    weights = [
        draw(laid_out((weight / weight.shape[1] ** 0.5).view(*weight.shape, *as_conv).to(dtype)))
        for weight in (reduce_weight, expand_weight)
    ]
    return {
        "x": x,
        "reduce_weight": weights[0],
        "reduce_bias": tensor(squeezed) if draw(flag) else None,
        "expand_weight": weights[1],
        "expand_bias": tensor(count) if draw(flag) else None,
        "shortcut": draw(maps(dtype, tuple(x.shape))) if draw(flag) else None,
        "activation": draw(st.sampled_from(["relu", "silu"])),
        "gate": draw(st.sampled_from(["sigmoid", "hard_sigmoid"])),
        "output_activation": draw(st.sampled_from(["identity", "relu"])),
    }


def has_statistics(x: Tensor) -> bool:
    return x.numel() != x.shape[1]


@st.composite
def batch_norm_act(draw):
    torch.manual_seed(draw(seeds))
    dtype = draw(DTYPES)
    x = draw(maps(dtype))
    samples, count = x.shape[:2]
    given = draw(flag) or not has_statistics(x)
    residual = draw(maps(dtype, tuple(x.shape))) if draw(flag) else None
    scale = torch.rand(samples) + 0.5
    return {
        "x": x,
        "weight": draw(st.none() | values(count, dtype)),
        "bias": draw(st.none() | values(count, dtype)),
        "mean": draw(values(count, dtype, gradient=False)) if given else None,
        "var": draw(values(count, dtype, positive=True, gradient=False)) if given else None,
        "residual": residual,
        "sample_scale": draw(laid_out(scale, False)) if draw(flag) else None,
        "eps": draw(st.sampled_from([1e-5, 1e-3, 1])),
        "activation": draw(st.sampled_from([*ACTIVATIONS, "leaky_relu"])),
        "negative_slope": draw(st.sampled_from([0.01, 0.3, 0])),
        "pool": residual is None and draw(flag),
    }


@st.composite
def conv3x3(draw):
    torch.manual_seed(draw(seeds))
    dtype = draw(DTYPES)
    padding = draw(st.sampled_from([0, 1, 2]))
    extent = st.integers(max(1, 3 - 2 * padding), 12)
    shape = (draw(st.integers(0, 3)), draw(channels), draw(extent), draw(extent))
    out = draw(channels)
    weight = torch.randn(out, shape[1], 3, 3) / (9 * shape[1]) ** 0.5
    return {
        "x": draw(maps(dtype, shape)),
        "weight": draw(laid_out(weight.to(dtype))),
        "bias": draw(st.none() | laid_out(torch.randn(out).to(dtype))),
        "padding": padding,
    }


@st.composite
def norms(draw, count: int, dtype: torch.dtype, given: bool, gradient=None, activation=None):
    return ops.Norm(
        draw(st.none() | values(count, dtype, gradient=gradient)),
        draw(st.none() | values(count, dtype, gradient=gradient)),
        draw(values(count, dtype, gradient=False)) if given else None,
        draw(values(count, dtype, positive=True, gradient=False)) if given else None,
        draw(st.sampled_from([1e-5, 1e-3])),
        activation or draw(st.sampled_from(ACTIVATIONS)),
    )


@st.composite
def depthwise_conv_bn_act(draw):
    torch.manual_seed(draw(seeds))
    dtype = draw(DTYPES)
    size = draw(st.sampled_from([3, 5, 7]))
    sides = draw(st.lists(st.integers(0, size - 1), min_size=4, max_size=4))
    padding = draw(st.sampled_from([size // 2, sides, tuple(sides)]))
    # With most paddings the padded maps are at least as large as the kernel.
    extent = st.integers(size if padding is not size // 2 else 1, 12)
    x = draw(maps(dtype, (draw(st.integers(1, 3)), draw(channels), draw(extent), draw(extent))))
    count = x.shape[1]
    weight = (torch.randn(count, 1, size, size) / size).to(dtype)
    # A single output per channel has no statistics of a batch.
    large = x.shape[0] > 1 or min(x.shape[2:]) > size + 2
    return {
        "x": x,
        "weight": draw(laid_out(weight)),
        "norm": draw(norms(count, dtype, draw(flag) or not large)),
        "input_norm": draw(st.none() | norms(count, dtype, draw(flag) or not large)),
        "stride": draw(st.sampled_from([1, 2])),
        "padding": padding,
        "pool": draw(flag),
    }


@st.composite
def sources(draw, dtype: torch.dtype, shape: tuple[int, ...]):
    """A source of maps of that shape, and what it gives."""
    raw = draw(laid_out((1.5 * torch.randn(shape)).to(dtype)))
    norm = draw(norms(shape[1], dtype, True))
    made = ops.batch_norm_act(raw, *norm[:4], eps=norm.eps, activation=norm.activation).out
    return ops.Source(raw, norm), draw(laid_out(made))


@st.composite
def pointwise_conv(draw):
    torch.manual_seed(draw(seeds))
    dtype = draw(DTYPES)
    shape = (draw(st.integers(0, 3)), draw(channels), draw(st.integers(1, 20)), draw(small))
    out = draw(channels)
    source, x = draw(sources(dtype, shape)) if draw(flag) else (None, draw(maps(dtype, shape)))
    weight = (torch.randn(out, shape[1]) / shape[1] ** 0.5).to(dtype)
    gate = torch.rand(shape[:2]) + 0.5
    return {
        "x": x,
        "weight": draw(laid_out(weight.view(out, -1, *draw(st.sampled_from([(), (1, 1)]))))),
        "gate": draw(st.none() | laid_out(gate.to(draw(st.sampled_from([dtype, torch.float32]))))),
        "source": source,
    }


@st.composite
def constant_layers(draw, dtype: torch.dtype, *shape: int, activation: str | None = None):
    weight = torch.randn(shape) / torch.Size(shape[1:]).numel() ** 0.5
    return ops.ConvNorm(
        draw(laid_out(weight.to(dtype), False)),
        draw(norms(shape[0], dtype, True, False, activation)),
    )


@st.composite
def excitations(draw, dtype: torch.dtype, count: int):
    hidden = draw(small)

    def parameter(*shape):
        value = torch.randn(shape) / torch.Size(shape[1:]).numel() ** 0.5
        return laid_out(value.to(dtype), False)

    return ops.Excitation(
        draw(parameter(hidden, count)),
        draw(st.none() | parameter(hidden)),
        draw(parameter(count, hidden)),
        draw(st.none() | parameter(count)),
        draw(st.sampled_from(["relu", "silu"])),
        draw(st.sampled_from(["sigmoid", "hard_sigmoid"])),
    )


@st.composite
def residual_sum(draw):
    torch.manual_seed(draw(seeds))
    dtype = draw(DTYPES)
    x = draw(maps(dtype))
    count = x.shape[1]
    given = draw(flag) or not has_statistics(x)
    return {
        "x": x,
        "shortcut": draw(maps(dtype, tuple(x.shape))),
        "norm": draw(norms(count, dtype, given, activation="identity")),
        "excitation": draw(st.none() | excitations(dtype, count)),
        "activation": draw(st.sampled_from(["identity", "relu"])),
    }


@st.composite
def mbconv_block(draw):
    torch.manual_seed(draw(seeds))
    dtype = draw(DTYPES)
    size, stride = draw(st.sampled_from([3, 5, 7])), draw(st.sampled_from([1, 2]))
    shape = (draw(st.integers(0, 3)), draw(channels), draw(small), draw(small))
    hidden, expands = shape[1], draw(flag)
    if expands:
        hidden = draw(channels)
    out = draw(st.just(shape[1]) | channels)
    x = torch.randn(shape).to(dtype)
    return {
        "x": draw(laid_out(x, False)),
        "depthwise": draw(constant_layers(dtype, hidden, 1, size, size)),
        "project": draw(constant_layers(dtype, out, hidden, activation="identity")),
        "expand": draw(constant_layers(dtype, hidden, shape[1])) if expands else None,
        "excitation": draw(st.none() | excitations(dtype, hidden)),
        "stride": stride,
        "padding": size // 2,
        "residual": stride == 1 and out == shape[1] and draw(flag),
    }


@st.composite
def stages(draw, count: int, out: int, kernel: int, dtype: torch.dtype):
    weight = torch.randn(out, count, kernel, kernel) / (count * kernel**2) ** 0.5
    # Few values near the ReLU's kink, where rounding decides on the derivative.
    shift = 2.0 if dtype == torch.float32 else 5.0
    bias = torch.where(torch.rand(count) < 0.5, -shift, shift) + 0.1 * torch.randn(count)
    return ops.NormConv(
        draw(laid_out(torch.rand(count) + 0.5)),
        draw(laid_out(bias)),
        draw(laid_out(0.1 * torch.randn(count), False)),
        draw(laid_out(torch.rand(count) + 0.5, False)),
        draw(laid_out(weight.to(dtype))),
    )


@st.composite
def dense_block(draw):
    torch.manual_seed(draw(seeds))
    dtype = draw(DTYPES)
    x = draw(maps(dtype))
    growth, width = draw(small), draw(st.integers(0, 9))
    layers, count = [], x.shape[1]
    for _ in range(draw(st.integers(1, 3))):
        last = draw(stages(width or count, growth, 3, dtype))
        layers.append([draw(stages(count, width, 1, dtype)), last] if width else [last])
        count += growth
    return {
        "x": x,
        "layers": layers,
        "training": has_statistics(x) and draw(flag),
        "momentum": draw(st.sampled_from([0.1, 1, 0])),
        "eps": draw(st.sampled_from([1e-5, 1e-3])),
        "dropout": draw(st.sampled_from([0.0, 0, 0.25])),
        "memory": draw(st.sampled_from(["balanced", "minimal"])),
    }


@st.composite
def transition(draw):
    torch.manual_seed(draw(seeds))
    dtype = draw(DTYPES)
    extent = st.integers(2, 9)
    shape = (draw(st.integers(0, 3)), draw(channels), draw(extent), draw(extent))
    x = draw(maps(dtype, shape))
    return {
        "x": x,
        "layer": draw(stages(x.shape[1], draw(small), 1, dtype)),
        "training": draw(flag),
        "momentum": 0.1,
        "eps": 1e-5,
    }


@st.composite
def bn_relu_conv1x1(draw):
    torch.manual_seed(draw(seeds))
    dtype = draw(DTYPES)
    buffer = draw(maps(dtype))
    first = draw(st.integers(0, buffer.shape[1] - 1))
    count = draw(st.integers(1, buffer.shape[1] - first))
    return {
        "maps": buffer,
        "layer": draw(stages(count, draw(small), 1, dtype)),
        "first": first,
        "training": has_statistics(buffer) and draw(flag),
        "momentum": 0.1,
        "eps": 1e-5,
    }


@st.composite
def channel_statistics(draw):
    torch.manual_seed(draw(seeds))
    buffer = draw(maps(draw(DTYPES)))
    first = draw(st.integers(0, buffer.shape[1]))
    count = draw(st.none() | st.integers(0, buffer.shape[1] - first))
    return {"maps": buffer, "first": first, "count": count}


@st.composite
def asff_fuse(draw):
    torch.manual_seed(draw(seeds))
    dtype = draw(DTYPES)
    factors = draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=2, max_size=5))
    unit = max(factors)
    samples, count = draw(st.integers(0, 2)), draw(channels)
    extent = st.integers(1, 3 if unit == 8 else 5)
    height, width = unit * draw(extent), unit * draw(extent)
    features = [
        draw(maps(dtype, (samples, count, height // factor, width // factor))) for factor in factors
    ]
    return {
        "features": features,
        "logits": draw(maps(dtype, (samples, len(factors), height, width))),
        "mode": draw(st.sampled_from(["nearest", "bilinear"])),
    }


@st.composite
def grids(draw):
    sizes = draw(st.lists(st.tuples(small, small), min_size=1, max_size=3))
    strides = [8 * 2**level for level in range(len(sizes))]
    scales = draw(st.sampled_from([(4,), (2, 3.3)]))
    return AnchorGrid.from_scales(sizes, strides, scales, offset=draw(st.sampled_from([0.5, 0])))


@st.composite
def assignments(draw, only_grid: bool = False):
    """The arguments that assigners share."""
    torch.manual_seed(draw(seeds))
    grid = draw(grids())
    boxes = [random_boxes(draw(st.integers(0, 5)), generator=torch.default_generator)]
    boxes += [random_boxes(3, generator=torch.default_generator) for _ in range(draw(small) // 4)]
    number = None
    if draw(flag):
        number = torch.tensor([len(image) for image in boxes])
        boxes = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True)
        boxes = draw(laid_out(boxes.to(draw(DTYPES)), False))
    with_tensor = not only_grid and draw(flag)
    masks = [(len(grid),), (len(number if number is not None else boxes), len(grid))]
    return {
        "anchors": draw(laid_out(grid.boxes(), False)) if with_tensor else grid,
        "num_level_anchors": grid.num_level_anchors if with_tensor or draw(flag) else None,
        "gt_boxes": boxes,
        "num_gt": number,
        "valid": torch.rand(draw(st.sampled_from(masks))) < 0.8 if draw(flag) else None,
    }


@st.composite
def pyramid_pool(draw):
    torch.manual_seed(draw(seeds))
    extent = st.integers(1, 20)
    shape = (draw(st.integers(0, 3)), draw(channels), draw(extent), draw(extent))
    return {"x": draw(maps(draw(DTYPES), shape))}


@st.composite
def atss_assign(draw):
    arguments = draw(assignments())
    images = len(arguments["gt_boxes"])
    regions = random_boxes(images, 2, generator=torch.default_generator)
    grid = isinstance(arguments["anchors"], AnchorGrid)
    return {
        **arguments,
        "topk": draw(small),
        "anchors_per_location": None if grid else draw(st.sampled_from([None, 1, 2])),
        "gt_ignore": draw(st.sampled_from([None, regions, list(regions)])),
        "ignore_iof_thr": draw(st.sampled_from([0.5, 0, 1])),
        "check_boxes": draw(st.sampled_from([None, True])),
    }


@st.composite
def max_iou_assign(draw):
    return {
        **draw(assignments()),
        "pos_iou": draw(st.sampled_from([0.5, 0.7, 1])),
        "neg_iou": draw(st.sampled_from([0.4, 0.1])),
        "low_quality": draw(flag),
    }


@st.composite
def fcos_assign(draw):
    arguments = draw(assignments())
    levels = arguments["num_level_anchors"] or arguments["anchors"].num_level_anchors
    arguments["num_level_anchors"] = levels
    radius = draw(st.sampled_from([None, 1.5, 2]))
    bounds = [0.0, *(2.0 ** (4 + level) for level in range(len(levels) - 1)), math.inf]
    return {
        **arguments,
        "ranges": list(itertools.pairwise(bounds)),
        "center_radius": radius,
        "strides": [8 * 2**level for level in range(len(levels))],
    }


@st.composite
def yolo_assign(draw):
    return {
        **draw(assignments(only_grid=True)),
        "ignore_iou": draw(st.sampled_from([0.5, 0.7])),
        "shape_iou": draw(st.sampled_from([1.0, 0.213])),
    }


@st.composite
def box_iou_loss(draw):
    torch.manual_seed(draw(seeds))
    dtype = draw(DTYPES)
    shape = draw(st.lists(st.integers(0, 9), max_size=3))
    pair = [random_boxes(*shape, generator=torch.default_generator) for _ in range(2)]
    pred, target = (draw(laid_out(boxes.to(dtype))) for boxes in pair)
    return {
        "pred": pred,
        "target": target,
        "kind": draw(st.sampled_from(["iou", "giou", "diou", "ciou"])),
        "reduction": draw(st.sampled_from(["none", "sum", "mean"])),
        "eps": draw(st.sampled_from([1e-7, 1e-3])),
    }


@st.composite
def sigmoid_focal_loss(draw):
    torch.manual_seed(draw(seeds))
    dtype = draw(DTYPES)
    rows = draw(st.lists(st.integers(0, 5), max_size=3))
    classes = draw(channels)
    labels = torch.randint(-1, classes + 1, rows)
    soft = torch.rand(*rows, classes).to(dtype)
    return {
        "logits": draw(laid_out((2 * torch.randn(*rows, classes)).to(dtype))),
        "targets": draw(laid_out(soft, False)) if draw(flag) else labels,
        "alpha": draw(st.sampled_from([0.25, -1, 0, 1])),
        "gamma": draw(st.sampled_from([2.0, 0, 1, 1.5])),
        "weight": torch.rand(rows) if draw(flag) else None,
        "reduction": draw(st.sampled_from(["none", "sum", "mean"])),
    }


ARGUMENTS = {
    strategy.__name__: strategy
    for strategy in (
        squeeze_excite,
        batch_norm_act,
        conv3x3,
        pointwise_conv,
        depthwise_conv_bn_act,
        mbconv_block,
        residual_sum,
        dense_block,
        transition,
        bn_relu_conv1x1,
        channel_statistics,
        asff_fuse,
        pyramid_pool,
        atss_assign,
        max_iou_assign,
        fcos_assign,
        yolo_assign,
        box_iou_loss,
        sigmoid_focal_loss,
    )
}


# ---- changes ------------------------------------------------------------------------------------


def with_first(value: float) -> Callable[[Tensor], Tensor]:
    """Changes the first element."""

    def change(tensor: Tensor) -> Tensor:
        result = tensor.detach().clone()
        if result.numel():
            result[(0,) * result.dim()] = value
        return result

    return change


def expanded(tensor: Tensor) -> Tensor:
    return tensor.detach()[:1].expand_as(tensor) if tensor.dim() and len(tensor) else tensor


def overlapping(tensor: Tensor) -> Tensor:
    """Neighbours in every dimension share memory."""
    return tensor.detach().clone().as_strided(tensor.shape, (1,) * tensor.dim())


def fewer(tensor: Tensor) -> Tensor:
    return tensor[..., :-1] if tensor.dim() else tensor


def doubled(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.dim() else tensor


def differentiable(tensor: Tensor) -> Tensor:
    floating = tensor.is_floating_point()
    return tensor.detach().clone().requires_grad_() if floating else tensor


OF_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda tensor: None,
    "a string": lambda tensor: "maps",
    "a number": lambda tensor: 1.5,
    "a list": lambda tensor: [1.0, 2.0],
    "an array": lambda tensor: tensor.detach().float().numpy(),
    **{
        f"{dtype}": lambda tensor, dtype=dtype: tensor.detach().to(dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    },
    **{
        f"{dtype}": lambda tensor, dtype=dtype: tensor.detach().nan_to_num().to(dtype)
        for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool)
    },
    "complex": lambda tensor: tensor.detach().to(torch.complex64),
    "float8": lambda tensor: tensor.detach().to(torch.float8_e4m3fn),
    "meta": lambda tensor: tensor.detach().to("meta"),
    "sparse": lambda tensor: tensor.detach().to_sparse(),
    "one dimension more": lambda tensor: tensor[None],
    "one dimension less": lambda tensor: tensor[0] if tensor.dim() and len(tensor) else tensor,
    "scalar": lambda tensor: torch.ones((), dtype=tensor.dtype),
    "flat": lambda tensor: tensor.flatten(),
    "empty": lambda tensor: tensor[:0] if tensor.dim() else tensor,
    "first alone": lambda tensor: tensor[:1] if tensor.dim() else tensor,
    "last dimension empty": lambda tensor: tensor[..., :0] if tensor.dim() else tensor,
    "fewer": fewer,
    "doubled": doubled,
    "transposed": lambda tensor: tensor.transpose(0, -1) if tensor.dim() else tensor,
    "expanded": expanded,
    "overlapping": overlapping,
    "in other order": lambda tensor: in_other_order(tensor.detach()),
    "in wider buffer": lambda t: in_wider_buffer(t.detach()) if t.dim() else t,
    "unaligned": lambda tensor: unaligned(tensor.detach()),
    "negated view": lambda t: torch._neg_view(t.detach()) if t.is_floating_point() else t,
    "with gradient": differentiable,
    "parameter": lambda t: torch.nn.Parameter(t.detach()) if t.is_floating_point() else t,
    "NaN": with_first(math.nan),
    "infinite": with_first(math.inf),
    "minus infinite": with_first(-math.inf),
    "huge value": with_first(1e30),
}
# Those that only a floating-point tensor can hold.
FLOATING = ("NaN", "infinite", "minus infinite", "huge value")
# What becomes of infinity, an infinity or NaN, depends on the order of these ops' arithmetic.
WITHOUT_LIMIT = FLOATING[1:]
IN_ANY_ORDER = (
    "batch_norm_act",
    "depthwise_conv_bn_act",
    "mbconv_block",
    "residual_sum",
    "dense_block",
    "transition",
    "bn_relu_conv1x1",
    "channel_statistics",
    "box_iou_loss",
)
# In these, what is not finite reaches more of the result than in the formula.
IN_TILES = ("conv3x3",)

OF_NUMBERS = [
    *(None, "1", [], math.nan, math.inf, -math.inf, 1e308, -1e-300, 0.5),
    *(-1, 0, 1, 2, 17, 2**31, 2**63 - 1, 2**63, 2**70, -(2**63), -(2**70), True, 1j),
    torch.tensor(1),
]
OF_FLAGS = [None, 0, 1, "yes", [], 2.5]
OF_STRINGS = [None, "", "softmax", 0, [], {}, b"relu"]
OF_SEQUENCES: dict[str, Callable[[Any], Any]] = {
    "None": lambda sequence: None,
    "an empty list": lambda sequence: [],
    "an iterator": iter,
    "a number": lambda sequence: 1,
    "a string": lambda sequence: "ab",
    "a tuple": tuple,
    "a list": list,
    "one less": lambda sequence: list(sequence)[:-1],
    "one more": lambda sequence: [*sequence, *list(sequence)[:1]],
    "a dictionary": lambda sequence: dict(enumerate(sequence)),
}
OF_GRIDS: dict[str, Callable[[AnchorGrid], Any]] = {
    "None": lambda grid: None,
    "a string": lambda grid: "grid",
    "boxes": lambda grid: grid.boxes(),
    "another": lambda grid: AnchorGrid.for_image((64, 64)),
    "meta": lambda grid: grid.to("meta"),
    "20 levels": lambda grid: AnchorGrid.from_scales([(1, 1)] * 20, [8] * 20),
    "no cells": lambda grid: AnchorGrid.from_scales([(0, 3)], [8]),
}

Path = tuple[Any, ...]


def places(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything within the arguments that can be changed."""
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


def replaced(value: Any, path: Path, new: Any) -> Any:
    """A copy of the value with something else at the path."""
    if not path:
        return new
    first, *rest = path
    if isinstance(value, dict):
        return {**value, first: replaced(value[first], tuple(rest), new)}
    items = list(value)
    items[first] = replaced(items[first], tuple(rest), new)
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def changes_of(value: Any, op: str) -> dict[str, Callable[[], Any]]:
    """What can stand in place of a value among an op's arguments."""
    if isinstance(value, Tensor):
        impossible = WITHOUT_LIMIT if op in IN_ANY_ORDER else FLOATING if op in IN_TILES else ()
        impossible = impossible if value.is_floating_point() else FLOATING
        table = {name: OF_TENSORS[name] for name in OF_TENSORS if name not in impossible}
    elif isinstance(value, AnchorGrid):
        table = OF_GRIDS
    elif isinstance(value, (list, tuple)):
        table = OF_SEQUENCES
    else:
        others = OF_NUMBERS
        if isinstance(value, bool):
            others = OF_FLAGS
        elif isinstance(value, str):
            others = OF_STRINGS
        elif value is None:
            others = [*OF_NUMBERS, *OF_STRINGS, torch.ones(1), torch.ones(2, 3)]
        return {brief(other): lambda other=other: other for other in others}
    return {name: lambda change=change: change(value) for name, change in table.items()}


@st.composite
def changed_calls(draw, name: str):
    """A valid call in which one argument, or a part of one, is changed."""
    arguments = draw(ARGUMENTS[name]())
    path, value = draw(st.sampled_from(list(places(arguments))))
    changes = changes_of(value, name)
    label = draw(st.sampled_from(list(changes)))
    changed = replaced(arguments, path, changes[label]())
    return Call(name, changed, f"{'.'.join(map(str, path))} to {label}")


def valid_calls(name: str) -> st.SearchStrategy[Call]:
    return ARGUMENTS[name]().map(lambda arguments: Call(name, arguments))
