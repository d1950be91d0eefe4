"""Outputs and gradients against the float64 formula and against eager PyTorch."""

import contextlib

import pytest
import torch

from dlkernels import ops, use_backend
from tests.numbers import DTYPES, FORMATS, assert_exact, relative_error
from tests.pointwise_conv.cases import (
    ACTIVATIONS,
    CASES,
    NAMES,
    apply_norm,
    as_leaves,
    lengths_of,
    make_source,
    make_tensors,
    plain,
)


def run(function, leaves, grad, *source):
    """The output, and the gradients of those leaves that there are."""
    out = function(*leaves, *source)
    out.backward(grad.to(out.dtype))
    return out, [None if leaf is None else leaf.grad for leaf in leaves]


def check(tensors, grad=None, leaves=None, source=None):
    """The op's results for tensors, or for leaves that have their values, are exact."""
    exact = as_leaves(tensors, torch.float64)
    expected = plain(*exact)
    if grad is None:
        grad = torch.randn_like(expected, dtype=tensors[0].dtype)
    if source is not None:
        # Backward computes the input again, and does not round it to the dtype of the maps.
        exact[0] = apply_norm(*source).requires_grad_()
    _, theirs = run(plain, exact, grad)
    out, ours = run(ops.pointwise_conv, leaves or as_leaves(tensors), grad, source)
    assert out.dtype == tensors[0].dtype
    lengths = lengths_of(tensors[0].shape, expected.shape[1])
    assert_exact("out", out, expected, lengths["out"])
    for name, tensor, a, b in zip(NAMES, tensors, ours, theirs, strict=True):
        if b is not None:
            assert a.dtype == tensor.dtype
            assert_exact(f"gradient of {name}", a, b, lengths[name])
    return out, ours


@pytest.mark.parametrize("gate", [None, torch.float32, "of x"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_cases(case, dtype, memory_format, gate):
    shape, channels = CASES[case]
    x, weight, factors = make_tensors(shape, channels, dtype, memory_format)
    gates = None if gate is None else factors.to(dtype if gate == "of x" else gate)
    out, grads = check([x, weight, gates])
    assert out.is_contiguous(memory_format=memory_format)
    assert grads[0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("area", [1, 2, 15, 17, 49, 196, 223, 224, 225, 447, 448, 449, 450, 673])
def test_every_way_in_which_tiles_end(area, memory_format, with_gate):
    x, weight, gate = make_tensors((3, 5, 1, area), 6, memory_format=memory_format)
    check([x, weight, gate if with_gate else None])


@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "channels", [1, 3, 8, 15, 16, 17, 31, 32, 33, 64, 112, 127, 128, 129, 255, 256, 257, 384, 390]
)
def test_channels_that_divide_nothing(channels, memory_format, with_gate):
    for shape, out in (((2, channels, 5, 6), 7), ((2, 7, 5, 6), channels)):
        x, weight, gate = make_tensors(shape, out, memory_format=memory_format)
        check([x, weight, gate if with_gate else None])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("shape", "out"), [((2, 144, 28, 28), 40), ((2, 40, 14, 14), 240)])
@pytest.mark.parametrize("with_gate", [False, True])
def test_as_exact_as_eager(shape, out, memory_format, with_gate):
    """Within twice eager's error in the same layout."""
    tensors = make_tensors(shape, out, memory_format=memory_format)
    if not with_gate:
        tensors[2] = None
    grad = torch.randn(shape[0], out, *shape[2:])
    result, grads = run(plain, as_leaves(tensors, torch.float64), grad)
    exact = (result, *grads)

    def errors_of(function):
        result, grads = run(function, as_leaves(tensors), grad)
        pairs = zip((result, *grads), exact, strict=True)
        return [relative_error(a, b) for a, b in pairs if b is not None]

    rounding = torch.finfo(torch.float32).eps
    for name, ours, eager in zip(
        ("out", *NAMES), errors_of(ops.pointwise_conv), errors_of(plain), strict=False
    ):
        assert ours <= 2 * max(eager, rounding), f"{name}: {ours}, eager {eager}"


def test_weight_of_a_convolution():
    x, weight, gate = make_tensors((2, 18, 9, 8), 20)
    kernel = weight[:, :, None, None].clone(memory_format=torch.channels_last).requires_grad_()
    matrix = weight.clone().requires_grad_()
    outs = [ops.pointwise_conv(x, w, gate) for w in (kernel, matrix)]
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    assert kernel.grad.shape == kernel.shape
    assert torch.equal(kernel.grad.flatten(1), matrix.grad)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gates_of_zero(memory_format):
    """They close the channel, but have a gradient themselves."""
    x, weight, gate = make_tensors((3, 18, 9, 8), 20, memory_format=memory_format)
    gate[1] = 0
    gate[:, 5] = 0
    out, grads = check([x, weight, gate])
    assert out[1].abs().sum() == 0
    assert grads[0][1].abs().sum() == 0
    assert grads[0][:, 5].abs().sum() == 0
    assert grads[1][:, 5].abs().sum() == 0
    assert (grads[2] != 0).all()


# ---- source --------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_source(case, dtype, memory_format, with_gate):
    shape, out = CASES[case]
    raw, weight, gate = make_tensors(shape, out, dtype, memory_format)
    source, x = make_source(raw)
    check([x, weight, gate if with_gate else None], source=source)


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "neither"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norms_of_a_source(activation, affine):
    raw, weight, gate = make_tensors((2, 35, 9, 8), 20)
    source, _ = make_source(raw, activation)
    changes = {name: None for name in ("weight", "bias") if affine not in ("both", name)}
    norm = source.norm._replace(**changes)
    check([apply_norm(raw, norm).float(), weight, gate], source=ops.Source(raw, norm))


@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_source_changes_no_more_than_rounding(memory_format, with_gate):
    raw, weight, gate = make_tensors((3, 35, 11, 13), 150, memory_format=memory_format)
    source, x = make_source(raw)
    grad = torch.randn(3, 150, 11, 13)
    tensors = [x, weight, gate if with_gate else None]
    out, grads = run(ops.pointwise_conv, as_leaves(tensors), grad)
    same, others = run(ops.pointwise_conv, as_leaves(tensors), grad, source)
    assert torch.equal(out, same)
    assert torch.equal(grads[0], others[0])
    for a, b in zip(others[1:], grads[1:], strict=True):
        assert a is b is None or relative_error(a, b) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_the_dtype_of_the_maps(dtype):
    raw, weight, gate = make_tensors((2, 35, 9, 8), 20, dtype)
    source, _ = make_source(raw)
    norm = ops.Norm(*(values.to(dtype) for values in source.norm[:4]), *source.norm[4:])
    check([apply_norm(raw, norm).to(dtype), weight, gate], source=ops.Source(raw, norm))


def test_a_source_of_another_layout():
    raw, weight, gate = make_tensors((2, 35, 9, 8), 20)
    source, x = make_source(raw)
    last = raw.contiguous(memory_format=torch.channels_last)
    check([x, weight, gate], source=source._replace(raw=last))
    # What is apart in memory.
    apart = ops.Norm(*(torch.stack([v, v], 1)[:, 0] for v in source.norm[:4]), *source.norm[4:])
    check([x, weight, gate], source=ops.Source(raw.transpose(2, 3).clone().transpose(2, 3), apart))


# ---- what must not leak --------------------------------------------------------------------------


@contextlib.contextmanager
def memory_of_nan():
    """New memory is full of NaN, scratch memory too."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", [*CASES, "nothing divides"])
def test_scratch_memory_does_not_leak(case, memory_format, with_gate, with_source):
    """Lanes and pixels beyond those that there are hold anything."""
    shape, out = CASES.get(case, ((2, 131, 15, 16), 139))
    raw, weight, gate = make_tensors(shape, out, memory_format=memory_format)
    source, x = make_source(raw) if with_source else (None, raw)
    tensors = [x, weight, gate if with_gate else None]
    grad = torch.randn(shape[0], out, *shape[2:])
    expected = run(ops.pointwise_conv, as_leaves(tensors), grad, source)
    with memory_of_nan():
        actual = run(ops.pointwise_conv, as_leaves(tensors), grad, source)
    assert torch.equal(actual[0], expected[0])
    for a, b in zip(actual[1], expected[1], strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_what_they_are_part_of(value, memory_format, with_gate):
    x, weight, gate = make_tensors((3, 18, 11, 12), 20, memory_format=memory_format)
    gate = gate if with_gate else None
    clean, others = ops.pointwise_conv(x, weight, gate), torch.arange(20) != 7
    x[1, 3, 4, 5] = value
    out = ops.pointwise_conv(x, weight, gate)
    pixels = torch.zeros(3, 1, 11, 12, dtype=torch.bool)
    pixels[1, 0, 4, 5] = True
    pixels = pixels.expand_as(out)
    assert not out[pixels].isfinite().any()
    assert torch.equal(out[~pixels], clean[~pixels])
    x[1, 3, 4, 5] = 0
    weight[7, 2] = value
    out = ops.pointwise_conv(x, weight, gate)
    assert not out[:, 7].isfinite().any()
    assert out[:, others].isfinite().all()


def test_a_gate_that_is_nan_stays_in_its_sample():
    x, weight, gate = make_tensors((3, 18, 5, 6), 20)
    clean = ops.pointwise_conv(x, weight, gate)
    gate[1, 3] = float("nan")
    out = ops.pointwise_conv(x, weight, gate)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


# ---- layouts and sizes ---------------------------------------------------------------------------

VIEWS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "in a wider buffer": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "behind the storage's beginning": lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view(
        t.shape
    ),
    "a slice of channels": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "channels first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["x", "weight", "gate", "grad"])
def test_other_strides_and_views(name, view):
    tensors = make_tensors((2, 18, 9, 10), 20)
    grad = torch.randn(2, 20, 9, 10)
    leaves = as_leaves(tensors)
    changed = VIEWS[view]
    if name == "grad":
        grad = changed(grad)
    else:
        place = NAMES.index(name)
        leaves[place] = changed(leaves[place].detach()).requires_grad_()
    check(tensors, grad, leaves)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_gradient_of_the_other_layout(memory_format):
    tensors = make_tensors((2, 18, 9, 10), 20, memory_format=memory_format)
    grad = torch.randn(2, 20, 9, 10)
    for other in FORMATS:
        _, grads = check(tensors, grad.contiguous(memory_format=other))
        assert grads[0].is_contiguous(memory_format=memory_format)


def test_expanded_tensors():
    x, weight, gate = make_tensors((1, 18, 9, 10), 1)
    tensors = [x.expand(3, -1, -1, -1), weight.expand(20, -1), gate[:, :1].expand(3, 18)]
    check(tensors, torch.ones(()).expand(3, 20, 9, 10))


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(0, 18, 5, 6), (2, 18, 0, 6), (2, 18, 5, 0)])
def test_empty_maps(shape, memory_format, with_gate, with_source):
    raw, weight, gate = make_tensors(shape, 20, memory_format=memory_format)
    source, x = make_source(raw) if with_source else (None, raw)
    tensors = [x, weight, gate if with_gate else None]
    grad = torch.zeros(shape[0], 20, *shape[2:])
    out, grads = run(ops.pointwise_conv, as_leaves(tensors), grad, source)
    assert out.shape == grad.shape
    for tensor, gradient in zip(tensors, grads, strict=True):
        assert tensor is gradient is None or gradient.shape == tensor.shape
        assert gradient is None or gradient.abs().sum() == 0


@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_bits(memory_format, with_gate):
    """The same every time; but for the weight's gradient for every thread count, too."""
    x, weight, gate = make_tensors((3, 35, 19, 17), 70, memory_format=memory_format)
    tensors = [x, weight, gate if with_gate else None]
    grad = torch.randn(3, 70, 19, 17)
    first, others = run(ops.pointwise_conv, as_leaves(tensors), grad)
    for threads in (1, 2, 2, 3, 8):
        torch.set_num_threads(threads)
        out, grads = run(ops.pointwise_conv, as_leaves(tensors), grad)
        assert torch.equal(out, first)
        for name, a, b in zip(NAMES, grads, others, strict=True):
            if name == "weight" and threads != 2:
                assert_exact(name, a, b.double(), 3 * 19 * 17)
            else:
                assert a is b is None or torch.equal(a, b), name


def test_gradcheck_of_float64():
    raw, weight, gate = make_tensors((2, 3, 4, 3), 2, torch.float64)
    source, x = make_source(raw)
    leaves = as_leaves([x, weight, gate.double()])
    for function in (
        ops.pointwise_conv,
        lambda x, weight, _: ops.pointwise_conv(x, weight),
        lambda *leaves: ops.pointwise_conv(*leaves, source),
    ):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(2, 18, 9, 10), (2, 18, 2, 2)])
def test_the_reference(shape, memory_format):
    """The formula, which knows of no source."""
    raw, weight, gate = make_tensors(shape, 20, torch.float64, memory_format)
    source, x = make_source(raw)
    grad = torch.randn(2, 20, *shape[2:]).double()
    for factors in (None, gate.double()):
        tensors = [x, weight, factors]
        expected = run(plain, as_leaves(tensors), grad)
        with use_backend("reference"):
            actual = run(ops.pointwise_conv, as_leaves(tensors), grad, source)
        assert relative_error(actual[0], expected[0]) < 1e-12
        assert actual[0].is_contiguous(memory_format=memory_format)
        for a, b in zip(actual[1], expected[1], strict=True):
            assert a is b is None or relative_error(a, b) < 1e-12


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(2, 18, 9, 10), (2, 18, 2, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_in_narrow_dtypes(dtype, shape, memory_format):
    x, weight, gate = make_tensors(shape, 20, dtype, memory_format)
    with use_backend("reference"):
        out = ops.pointwise_conv(x, weight, gate)
    expected = plain(x.double(), weight.double(), gate.double())
    assert out.dtype == dtype
    # Gates and gated values are rounded.
    assert relative_error(out, expected) < 4 * torch.finfo(dtype).eps
