"""Outputs and gradients against the float64 formula and against eager PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from dlkernels import ops, use_backend
from tests.conv3x3.cases import CASES, NAMES, as_leaves, lengths_of, make_tensors
from tests.numbers import DTYPES, FORMATS, assert_exact, relative_error


def run(function, leaves, grad, padding):
    """The output, and the gradients of those leaves that there are."""
    out = function(*leaves, padding=padding)
    out.backward(grad.to(out.dtype))
    return out, [None if leaf is None else leaf.grad for leaf in leaves]


def check(tensors, padding, grad=None, leaves=None):
    """The op's results for tensors, or for leaves that have their values, are exact."""
    exact = as_leaves(tensors, torch.float64)
    if grad is None:
        grad = torch.randn_like(F.conv2d(*tensors, padding=padding))
    expected, theirs = run(F.conv2d, exact, grad, padding)
    out, ours = run(ops.conv3x3, leaves or as_leaves(tensors), grad, padding)
    assert out.dtype == tensors[0].dtype
    lengths = lengths_of(tensors[0].shape, expected.shape)
    assert_exact("out", out, expected, lengths["out"])
    for name, tensor, a, b in zip(NAMES, tensors, ours, theirs, strict=True):
        if b is not None:
            assert a.dtype == tensor.dtype
            assert_exact(f"gradient of {name}", a, b, lengths[name])
    return out, ours


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_cases(case, dtype, memory_format):
    shape, channels, padding = CASES[case]
    tensors = make_tensors(shape, channels, dtype, memory_format)
    out, _ = check(tensors, padding)
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_all_small_sizes(padding, memory_format):
    """Every way in which tiles, maps and padding end."""
    least = max(1, 3 - 2 * padding)
    for height in range(least, least + 5):
        for width in range(least, least + 5):
            tensors = make_tensors((2, 5, height, width), 6, memory_format=memory_format)
            check(tensors, padding)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("channels", [1, 3, 8, 15, 16, 17, 31, 32, 33, 64, 130, 257])
def test_channels_that_divide_nothing(channels, memory_format):
    for shape, out in (((1, channels, 5, 6), 7), ((1, 7, 5, 6), channels)):
        check(make_tensors(shape, out, memory_format=memory_format), 1)


def test_without_bias():
    x, weight, _ = make_tensors((2, 18, 9, 8), 20)
    check([x, weight, None], 1)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "out"), [((2, 64, 28, 28), 64), ((2, 256, 14, 14), 128), ((1, 512, 7, 7), 512)]
)
def test_as_exact_as_eager(shape, out, memory_format):
    """Within twice eager's error in the same layout."""
    tensors = make_tensors(shape, out)
    grad = torch.randn(shape[0], out, *shape[2:])

    def errors_of(function):
        leaves = as_leaves([tensors[0].contiguous(memory_format=memory_format), *tensors[1:]])
        result, grads = run(function, leaves, grad, 1)
        return [relative_error(a, b) for a, b in zip((result, *grads), exact, strict=True)]

    result, grads = run(F.conv2d, as_leaves(tensors, torch.float64), grad, 1)
    exact = (result, *grads)
    rounding = torch.finfo(torch.float32).eps
    names = ("out", *NAMES)
    for name, ours, eager in zip(names, errors_of(ops.conv3x3), errors_of(F.conv2d), strict=True):
        assert ours <= 2 * max(eager, rounding), f"{name}: {ours}, eager {eager}"


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_mean_far_from_zero(memory_format):
    """Differences of neighbours, which the transform takes, cancel here."""
    x, weight, bias = make_tensors((2, 40, 14, 14), 40, memory_format=memory_format)
    check([x + 100, weight.abs(), bias], 1)


# ---- NaN and infinity ----------------------------------------------------------------------------


def reached(at, size, padding):
    """Which of the rows, or columns, belong to tiles that read the one at an index."""
    tiles = torch.arange(size + 2 * padding - 2) // 2
    first = 2 * tiles - padding  # of four
    return (first <= at) & (at < first + 4)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_within_their_tiles(value, padding, memory_format):
    x, weight, bias = make_tensors((2, 18, 11, 12), 20, memory_format=memory_format)
    clean = ops.conv3x3(x, weight, bias, padding=padding)
    for row, column in ((0, 0), (4, 5), (5, 6), (10, 11)):
        spoilt = x.clone()
        spoilt[1, 3, row, column] = value
        out = ops.conv3x3(spoilt, weight, bias, padding=padding)
        plain = F.conv2d(spoilt, weight, bias, padding=padding)
        tiles = torch.outer(reached(row, 11, padding), reached(column, 12, padding))
        tiles = torch.stack([torch.zeros_like(tiles), tiles])[:, None].expand_as(out)
        assert torch.equal(out[~tiles], clean[~tiles])
        assert not out[~plain.isfinite()].isfinite().any()


def test_nan_in_a_weight_stays_in_its_channel():
    x, weight, bias = make_tensors((2, 18, 11, 12), 20)
    clean = ops.conv3x3(x, weight, bias)
    weight[7, 2, 1, 1] = float("nan")
    out = ops.conv3x3(x, weight, bias)
    assert out[:, 7].isnan().all()
    others = torch.arange(20) != 7
    assert torch.equal(out[:, others], clean[:, others])


# ---- layouts and sizes ---------------------------------------------------------------------------

VIEWS = {
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "in a wider buffer": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "behind the storage's beginning": lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view(
        t.shape
    ),
    "a slice of channels": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "flipped and back": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["x", "weight", "grad"])
def test_other_strides_and_views(name, view):
    x, weight, bias = make_tensors((2, 18, 9, 10), 20)
    grad = torch.randn(2, 20, 9, 10)
    leaves = as_leaves([x, weight, bias])
    changed = VIEWS[view]
    if name == "grad":
        grad = changed(grad)
    else:
        place = NAMES.index(name)
        leaves[place] = changed(leaves[place].detach()).requires_grad_()
    check([x, weight, bias], 1, grad, leaves)


def test_expanded_tensors():
    x, weight, bias = make_tensors((1, 18, 9, 10), 1)
    x, weight = x.expand(3, -1, -1, -1), weight.expand(20, -1, -1, -1)
    check([x, weight, bias.expand(20)], 1, torch.ones(()).expand(3, 20, 9, 10))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_empty_batch(memory_format):
    tensors = make_tensors((0, 18, 5, 6), 20, memory_format=memory_format)
    out, grads = run(ops.conv3x3, as_leaves(tensors), torch.zeros(0, 20, 5, 6), 1)
    assert out.shape == (0, 20, 5, 6)
    assert grads[0].shape == (0, 18, 5, 6)
    assert all(grad.shape == t.shape for grad, t in zip(grads, tensors, strict=True))
    assert all(grad.abs().sum() == 0 for grad in grads[1:])


@pytest.mark.parametrize("memory_format", FORMATS)
def test_same_bits_every_time_and_for_every_thread_count(memory_format):
    tensors = make_tensors((3, 35, 19, 17), 70, memory_format=memory_format)
    grad = torch.randn(3, 70, 19, 17)
    first = run(ops.conv3x3, as_leaves(tensors), grad, 1)
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        out, grads = run(ops.conv3x3, as_leaves(tensors), grad, 1)
        assert torch.equal(out, first[0])
        for name, a, b in zip(NAMES, grads, first[1], strict=True):
            assert torch.equal(a, b), name


def test_gradcheck_of_float64():
    leaves = as_leaves(make_tensors((2, 3, 4, 3), 2), torch.float64)
    for padding in (0, 1, 2):
        assert torch.autograd.gradcheck(
            lambda *t, padding=padding: ops.conv3x3(*t, padding=padding), leaves
        )


def test_reference_backend_is_the_formula():
    tensors = make_tensors((2, 18, 9, 10), 20)
    with use_backend("reference"):
        out = ops.conv3x3(*tensors)
    assert torch.equal(out, F.conv2d(*tensors, padding=1))
