"""The CUDA kernels of squeeze_excite, run on the CPU block by block."""

import struct

import pytest
import torch

from tests.gpu_proof.cuda_on_cpu.emulator import (
    COUNTED,
    compile_program,
    run_program,
    traffic_of,
)
from tests.numbers import DTYPES, FORMATS, assert_exact
from tests.squeeze_excite.cases import NAMES, OPTIONS, make_inputs
from tests.squeeze_excite.test_numbers import plain, run

# (N, C, H, W, R)
SHAPES = {
    "minimal": (1, 1, 1, 1, 1),
    "non-aligned": (2, 7, 5, 3, 2),
    "vectors": (2, 40, 4, 6, 10),
    "several blocks": (1, 150, 4, 4, 37),
    "several stretches": (1, 3, 131, 129, 2),
    "empty batch": (0, 8, 4, 4, 2),
    "empty maps": (2, 8, 0, 4, 2),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program("squeeze_excite", tmp_path_factory.mktemp("squeeze_excite"))


def as_bytes(tensor, memory_format):
    if tensor is None:
        return b""
    if tensor.dim() == 4 and memory_format == torch.channels_last:
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return compile_program("squeeze_excite", tmp_path_factory.mktemp("counted"), COUNTED)


def launch_on_cpu(program, inputs, grad, memory_format, activation, gate, output_activation):
    """The finished process, forward and backward in every order of blocks and threads."""
    x, reduce_weight, reduce_bias, _, _, shortcut = inputs.tensors
    n, c, h, w = x.shape
    r = reduce_weight.shape[0]
    header = struct.pack(
        "11q",
        DTYPES.index(x.dtype),
        memory_format == torch.channels_last,
        *(n, c, h * w, r),
        ("relu", "silu").index(activation),
        ("sigmoid", "hard_sigmoid").index(gate),
        output_activation == "relu",
        reduce_bias is not None,
        shortcut is not None,
    )
    arrays = b"".join(as_bytes(tensor, memory_format) for tensor in [*inputs.tensors, grad])
    result = run_program(program, given=header + arrays)
    assert result.returncode == 0, result.stderr.decode()
    return result


def run_on_cpu(program, inputs, grad, memory_format, **options):
    """Output and gradients, as the CUDA kernels compute them."""
    result = launch_on_cpu(program, inputs, grad, memory_format, **options)
    x, reduce_weight, *_, shortcut = inputs.tensors
    n, c, h, w = x.shape
    r = reduce_weight.shape[0]
    stream = torch.frombuffer(bytearray(result.stdout or b"\0"), dtype=torch.uint8)
    position = 0

    def take(shape, dtype):
        nonlocal position
        size = torch.Size(shape).numel() * dtype.itemsize
        tensor = stream[position : position + size].clone().view(dtype)
        position += size
        if len(shape) == 4 and memory_format == torch.channels_last:
            return tensor.view(n, h, w, c).permute(0, 3, 1, 2)
        return tensor.view(shape)

    out = take(x.shape, x.dtype)
    saved = [take(shape, torch.float32) for shape in ((n, c), (n, r), (n, c))]
    shapes = [x.shape, (r, c), (r,), (c, r), (c,)]
    if shortcut is not None:
        shapes.append(x.shape)
    grads = [take(shape, x.dtype) for shape in shapes]
    assert position == len(result.stdout)
    return out, saved, grads


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(program, shape, dtype, memory_format, options):
    shortcut = options["output_activation"] == "relu"
    bias = options["activation"] == "relu"
    inputs = make_inputs(shape, dtype, memory_format, bias, shortcut)
    grad = torch.randn(shape[:4]).to(dtype)
    out, _, grads = run_on_cpu(program, inputs, grad, memory_format, **options)
    expected, expected_grads = run(plain, inputs.leaves(torch.float64), grad, **options)

    length = max(shape[1], shape[2] * shape[3])
    assert_exact("out", out, expected, length)
    if 0 in shape[2:4]:  # the means are NaN, and so are the gradients of the weights
        return
    for name, actual, wanted in zip(NAMES, grads, expected_grads, strict=False):
        if wanted is not None:
            assert_exact(f"gradient of {name}", actual, wanted, length)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nan_and_infinity_propagate(program, value, options):
    inputs = make_inputs((2, 9, 5, 5, 4))
    inputs.tensors[0][1, 3, 2, 2] = value
    grad = torch.zeros(2, 9, 5, 5)
    ours, _, _ = run_on_cpu(program, inputs, grad, torch.contiguous_format, **options)
    wanted = plain(*[None if t is None else t.double() for t in inputs.tensors], **options)
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours.isinf(), wanted.isinf())


@pytest.mark.parametrize("options", ["efficientnet", "se-resnet"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_traffic(counted, memory_format, options):
    """At most 1.1 times what must move: a gate needs all of its map, a map is read twice."""
    shortcut = options == "se-resnet"
    inputs = make_inputs((1, 64, 16, 16, 4), memory_format=memory_format, shortcut=shortcut)
    x = inputs.tensors[0]
    result = launch_on_cpu(counted, inputs, torch.randn_like(x), memory_format, **OPTIONS[options])
    forward = 2 + shortcut + 1  # x twice and the shortcut, the result
    backward = 2 * (1 + shortcut) + 1 + 1 + shortcut  # gradient and result twice, x, the gradients
    floor = (forward + backward) * x.nbytes
    moved = sum(loaded + stored for loaded, stored in traffic_of(result))
    assert floor <= moved <= 1.1 * floor, moved / floor
