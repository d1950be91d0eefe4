"""The Triton kernels of squeeze_excite, run by the interpreter."""

import pytest
import torch

from dlkernels import ops
from dlkernels.backend import availability
from tests.gpu_proof.traffic import count_traffic
from tests.numbers import DTYPES, FORMATS, assert_exact
from tests.squeeze_excite.cases import NAMES, OPTIONS, make_inputs
from tests.squeeze_excite.test_numbers import plain, run

# NumPy, which stands in for the GPU here, warns of what the kernels are to propagate.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

# (N, C, H, W, R)
SHAPES = {
    "minimal": (1, 1, 1, 1, 1),
    "non-aligned": (2, 7, 5, 3, 2),
    "several blocks": (2, 130, 7, 5, 20),
    "several stretches": (1, 3, 131, 129, 2),
}


def test_triton_serves():
    assert availability()["squeeze_excite"]["triton"] == "available"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(shape, dtype, memory_format, options):
    shortcut = options["output_activation"] == "relu"
    bias = options["activation"] == "relu"
    inputs = make_inputs(shape, dtype, memory_format, bias, shortcut)
    grad = torch.randn(shape[:4]).to(dtype)
    out, grads = run(ops.squeeze_excite, inputs.leaves(), grad, **options)
    expected, expected_grads = run(plain, inputs.leaves(torch.float64), grad, **options)

    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    length = max(shape[1], shape[2] * shape[3])
    assert_exact("out", out, expected, length)
    for name, actual, wanted in zip(NAMES, grads, expected_grads, strict=True):
        if wanted is not None:
            assert_exact(f"gradient of {name}", actual, wanted, length)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nan_and_infinity_propagate(value, options):
    inputs = make_inputs((2, 9, 5, 5, 4))
    inputs.tensors[0][1, 3, 2, 2] = value
    ours = ops.squeeze_excite(*inputs.tensors, **options)
    wanted = plain(*[None if t is None else t.double() for t in inputs.tensors], **options)
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours.isinf(), wanted.isinf())


@pytest.mark.parametrize("shape", [(0, 6, 4, 4, 2), (2, 6, 0, 4, 2)])
def test_empty_maps(shape):
    out, grads = run(
        ops.squeeze_excite,
        make_inputs(shape).leaves(),
        torch.zeros(shape[:4]),
        **OPTIONS["plain"],
    )
    assert out.shape == grads[0].shape == shape[:4]
    if shape[0] == 0:
        assert all(grad.abs().sum() == 0 for grad in grads[1:5])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_traffic(memory_format, options):
    """At most 1.1 times what the passes must move, each byte of the maps once a pass.

    A grid of programs cannot wait for the pooled sums, so that the maps are read once to be pooled
    and once to be scaled.
    """
    shortcut = options["output_activation"] == "relu"
    inputs = make_inputs((2, 64, 24, 20, 4), memory_format=memory_format, shortcut=shortcut)
    leaves = inputs.leaves()
    maps = 4 * leaves[0].numel()
    small = 4 * sum(leaf.numel() for leaf in leaves[1:5])

    with count_traffic() as forward:
        out = ops.squeeze_excite(*leaves, **options)
    reads_and_writes = 3 + shortcut
    assert maps * reads_and_writes <= forward.moved <= 1.1 * (maps * reads_and_writes + small)
    assert forward.sectors <= 1.1 * forward.moved

    with count_traffic() as backward:
        out.backward(torch.randn_like(out))
    # The sums read x and grad_out, the last pass reads grad_out and writes grad_x; under a ReLU
    # both read its mask, and the gradient of the shortcut is written.
    reads_and_writes = 4 + 3 * shortcut
    assert maps * reads_and_writes <= backward.moved <= 1.1 * (maps * reads_and_writes + 2 * small)
    assert backward.sectors <= 1.1 * backward.moved
    assert forward.atomics == backward.atomics == 0
