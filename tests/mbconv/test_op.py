"""What PyTorch needs of the op, and bad input."""

import pytest
import torch

from dlkernels import ops
from dlkernels.mbconv import block
from dlkernels.mbconv.op import Norm
from tests.mbconv.cases import BLOCKS, as_leaves, block_arguments, make_leaves, norms_of
from tests.numbers import FORMATS, relative_error

OP = torch.ops.dlkernels.depthwise_conv_bn_act.default


def arguments(tensors, evaluation, pool, keep_raw):
    norm, before = norms_of(tensors, evaluation)
    return (*tensors[:2], *norm, True, *before, 2, [1, 1, 1, 1], pool, keep_raw)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
def test_opcheck(memory_format, evaluation):
    tensors = make_leaves((2, 18, 6, 5), 3, torch.float32, memory_format)
    torch.library.opcheck(OP, arguments(as_leaves(tensors), evaluation, evaluation, True))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck_of_inference(memory_format):
    tensors = make_leaves((2, 18, 6, 5), 3, torch.float32, memory_format)
    torch.library.opcheck(OP, arguments(tensors, True, True, False))


def test_compile_without_graph_breaks():
    tensors = make_leaves((2, 18, 6, 5), 3, torch.float32, torch.contiguous_format)

    def function(*leaves):
        norm, before = norms_of(leaves, False)
        return ops.depthwise_conv_bn_act(*leaves[:2], norm, before, padding=1).out * 2

    ours, compiled = as_leaves(tensors), as_leaves(tensors)
    expected = function(*ours)
    actual = torch.compile(function, fullgraph=True)(*compiled)
    expected.sum().backward()
    actual.sum().backward()
    assert torch.equal(actual, expected)
    for a, b in zip(ours[:6], compiled[:6], strict=True):
        assert relative_error(b.grad, a.grad) < 1e-6


def test_saved_for_backward():
    """The input and the raw output; the rest is of the size of the channels."""
    leaves = as_leaves(make_leaves((2, 16, 6, 5), 3, torch.float32, torch.contiguous_format))
    saved = []
    norm, before = norms_of(leaves, False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.depthwise_conv_bn_act(*leaves[:2], norm, before, padding=1)
    assert sorted(t.numel() for t in saved) == [16] * 8 + [16 * 9] + [2 * 16 * 6 * 5] * 2


@pytest.mark.parametrize("name", ["residual", "no expansion, stride 2"])
def test_opcheck_of_block(name):
    """The public function's checks leave no way to the op with gradients."""
    arguments = block_arguments(BLOCKS[name], torch.float32, torch.channels_last)
    given = []
    op = torch.ops.dlkernels.mbconv_block.default
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "_OP", lambda *values: given.append(values) or op(*values))
        ops.mbconv_block(**arguments)
    torch.library.opcheck(op, given[0])


def test_compile_of_block():
    arguments = block_arguments(BLOCKS["residual"], torch.float32, torch.channels_last)

    def function(x):
        return ops.mbconv_block(**{**arguments, "x": x}) * 2

    x = arguments["x"]
    assert torch.equal(torch.compile(function, fullgraph=True)(x), function(x))


def bad(**changes):
    values = {
        "x": torch.randn(2, 8, 6, 6),
        "weight": torch.randn(8, 1, 3, 3),
        "norm": Norm(),
        "input_norm": None,
        **changes,
    }
    return ops.depthwise_conv_bn_act(**values)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(8, 6, 6)}, ValueError, r"x must have shape \[N, C, H, W\]"),
        ({"weight": torch.randn(4, 2, 3, 3)}, ValueError, r"groups equal.*\[4, 2, 3, 3\]"),
        ({"weight": torch.randn(8, 1, 4, 4)}, ValueError, r"K = 3, 5 or 7.*\[8, 1, 4, 4\]"),
        ({"weight": torch.randn(8, 1, 7, 7)}, ValueError, "must not be larger than the padded"),
        ({"weight": torch.randn(8, 1, 3, 3).half()}, TypeError, "weight must be float32"),
        ({"stride": 3}, ValueError, "stride must be 1 or 2, but is 3"),
        ({"padding": 3}, ValueError, "each from 0 to 2"),
        ({"padding": (1, 1)}, ValueError, "one number or four"),
        ({"norm": Norm(mean=torch.ones(8))}, ValueError, "norm.mean and norm.var must be given"),
        ({"norm": Norm(torch.ones(7))}, ValueError, r"norm.weight must have shape \[8\].*\[7\]"),
        (
            {"norm": Norm(mean=torch.ones(8), var=torch.ones(9))},
            ValueError,
            r"norm.var must have shape \[8\].*\[9\]",
        ),
        (
            {"input_norm": Norm(mean=torch.ones(1, 8), var=torch.ones(8))},
            ValueError,
            r"input_norm.mean must have shape \[8\].*\[1, 8\]",
        ),
        ({"norm": Norm(activation="tanh")}, ValueError, "norm.activation must be one of"),
        ({"x": torch.randn(1, 8, 3, 3)}, ValueError, "more than one output per channel"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        bad(**changes)


def changed(layer, **changes):
    """A layer with other values in its norm."""
    return layer._replace(norm=layer.norm._replace(**changes))


BAD_BLOCKS = {
    "x": (lambda a: {"x": a["x"][0]}, ValueError, r"x must have shape \[N, C, H, W\]"),
    "channels": (
        lambda a: {"x": torch.randn(1, 8, 12, 9)},
        ValueError,
        r"expand.weight must have shape \[channels, 8\]",
    ),
    "no layer": (
        lambda a: {"project": a["project"].weight},
        TypeError,
        "project must be a ConvNorm, but is Tensor",
    ),
    "batch statistics": (
        lambda a: {"project": changed(a["project"], mean=None, var=None)},
        ValueError,
        "project.norm must have statistics",
    ),
    "activation": (
        lambda a: {"project": changed(a["project"], activation="relu")},
        ValueError,
        "project.norm.activation must be 'identity', but is 'relu'",
    ),
    "depthwise": (
        lambda a: {"depthwise": a["depthwise"]._replace(weight=torch.randn(144, 1, 4, 4))},
        ValueError,
        r"weight must have shape \[144, 1, K, K\]",
    ),
    "gate": (
        lambda a: {"excitation": a["excitation"]._replace(gate="tanh")},
        ValueError,
        "excitation.gate must be .*tanh",
    ),
    "excitation": (
        lambda a: {"excitation": a["excitation"]._replace(squeeze_bias=torch.randn(7))},
        ValueError,
        r"excitation.squeeze_bias must have shape \[6\]",
    ),
    "residual": (
        lambda a: {"stride": 2},
        ValueError,
        r"residual must be False where the output, \[24, 7, 9\]",
    ),
    "dtype": (
        lambda a: {"project": a["project"]._replace(weight=a["project"].weight.half())},
        TypeError,
        "project.weight must be float32",
    ),
    "gradient": (
        lambda a: {"x": a["x"].requires_grad_()},
        ValueError,
        "x must not require a gradient",
    ),
}


@pytest.mark.parametrize("case", BAD_BLOCKS)
def test_bad_block(case):
    change, error, message = BAD_BLOCKS[case]
    arguments = block_arguments(BLOCKS["residual"], torch.float32, torch.contiguous_format)
    with pytest.raises(error, match=message):
        ops.mbconv_block(**{**arguments, **change(arguments)})
