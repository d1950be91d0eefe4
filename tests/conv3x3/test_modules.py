"""nn.Conv2d takes the place of torch.nn.Conv2d: keys, options, results, export."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

import dlkernels.nn
from dlkernels import use_backend
from dlkernels.conv3x3 import modules
from dlkernels.conv3x3.modules import (
    MIN_CHANNELS,
    MIN_PIXELS,
    MIN_PIXELS_OF_WEIGHT_GRADIENT,
    MIN_PRODUCTS_OF_WEIGHT_GRADIENT,
    fits,
    padding_of,
    pays,
    weight_gradient_pays,
)
from tests.numbers import FORMATS, assert_exact, relative_error

CHANNELS = MIN_CHANNELS + 8
SIZE = 28
MAPS = (2, CHANNELS, SIZE, SIZE)
assert 2 * (SIZE - 2) ** 2 >= MIN_PIXELS

# Options of the constructor after the number of channels, and whether the op computes them.
OPTIONS = {
    "usual": ({"kernel_size": 3, "padding": 1}, True),
    "no padding, no bias": ({"kernel_size": 3, "bias": False}, True),
    "padding of 2": ({"kernel_size": 3, "padding": (2, 2)}, True),
    "same": ({"kernel_size": (3, 3), "padding": "same"}, True),
    "valid": ({"kernel_size": 3, "padding": "valid"}, True),
    "other sides": ({"kernel_size": 3, "padding": (1, 0)}, False),
    "more padding": ({"kernel_size": 3, "padding": 3}, False),
    "reflection": ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, False),
    "stride 2": ({"kernel_size": 3, "padding": 1, "stride": 2}, False),
    "dilated": ({"kernel_size": 3, "padding": 1, "dilation": 2}, False),
    "groups": ({"kernel_size": 3, "padding": 1, "groups": 2}, False),
    "1x1": ({"kernel_size": 1}, False),
    "3x1": ({"kernel_size": (3, 1), "padding": (1, 0)}, False),
    "5x5, same": ({"kernel_size": 5, "padding": "same"}, False),
}


def make(channels=CHANNELS, out=CHANNELS, kernel_size=3, padding=1, **options):
    """The drop-in and the module that it replaces, with equal parameters."""
    ours, theirs = (
        kind(channels, out, kernel_size, padding=padding, **options)
        for kind in (dlkernels.nn.Conv2d, nn.Conv2d)
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def counted():
    """Counts the calls of the op."""
    return mock.patch.object(modules, "conv3x3", side_effect=modules.conv3x3)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", OPTIONS)
def test_as_pytorchs(case, memory_format):
    options, is_served = OPTIONS[case]
    ours, theirs = make(**options)
    theirs.double()
    assert fits(ours) == is_served
    assert repr(ours) == repr(theirs)
    x = torch.randn(MAPS).contiguous(memory_format=memory_format)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    with counted() as calls:
        out = ours(a)
    assert calls.call_count == is_served
    expected = theirs(b)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_exact("out", out, expected, 9 * CHANNELS)
    assert_exact("gradient of x", a.grad, b.grad, 9 * CHANNELS)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_exact(f"gradient of {name}", p.grad, q.grad, 2 * SIZE**2)


def test_state_dict_loads_both_ways():
    ours, theirs = make()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(nn.Conv2d(CHANNELS, CHANNELS, 3).state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert isinstance(ours, nn.Conv2d)


def test_the_same_initial_values():
    torch.manual_seed(1)
    ours = dlkernels.nn.Conv2d(4, 8, 3)
    torch.manual_seed(1)
    theirs = nn.Conv2d(4, 8, 3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def pytorchs(module, x):
    """The result, of which the op must have no part."""
    with counted() as calls:
        out = module(x)
    assert not calls.called
    return out


def test_where_it_does_not_pay_pytorchs_convolution_runs():
    ours, theirs = make()
    few = make(channels=MIN_CHANNELS - 1)
    narrow = make(out=MIN_CHANNELS - 1)
    for (a, b), shape in {
        (ours, theirs): (1, CHANNELS, 4, 4),
        few: (2, MIN_CHANNELS - 1, SIZE, SIZE),
        narrow: MAPS,
    }.items():
        x = torch.randn(shape)
        assert torch.equal(pytorchs(a, x), b(x))


def test_what_pays():
    x, weight = torch.empty(MAPS), torch.empty(CHANNELS, CHANNELS, 3, 3)
    assert pays(x, weight)
    assert pays(torch.empty(1, CHANNELS, MIN_PIXELS, 1), weight)
    assert not pays(torch.empty(1, CHANNELS, MIN_PIXELS - 1, 1), weight)
    assert pays(torch.empty(1, CHANNELS, MIN_PIXELS, 3), weight, padding=2)
    assert not pays(torch.empty(1, CHANNELS, MIN_PIXELS, 2), weight, padding=0)
    for other in (x[0], x.bfloat16(), x.double(), x.to("meta"), x[:, 1:], x[:0], None):
        assert not pays(other, weight)
    assert not pays(x, weight.double())
    assert not pays(x, weight.to("meta"))
    with use_backend("reference"):
        assert not pays(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not pays(x, weight)
        with torch.autocast("cpu", enabled=False):
            assert pays(x, weight)


def test_what_the_gradient_of_the_weight_pays():
    out = -(-MIN_PRODUCTS_OF_WEIGHT_GRADIENT // CHANNELS)
    weight = torch.empty(out, CHANNELS, 3, 3)
    x = torch.empty(1, CHANNELS, MIN_PIXELS_OF_WEIGHT_GRADIENT, 1)
    assert weight_gradient_pays(x, weight)
    assert not weight_gradient_pays(x[:, :, 1:], weight)
    assert not weight_gradient_pays(x, weight[:-1])
    assert not weight_gradient_pays(x.bfloat16(), weight.bfloat16())


def test_the_reference_backend():
    ours, theirs = make()
    x = torch.randn(MAPS)
    with use_backend("reference"):
        assert torch.equal(pytorchs(ours, x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    ours, theirs = (module.to(dtype) for module in make())
    x = torch.randn(MAPS).to(dtype)
    assert torch.equal(pytorchs(ours, x), theirs(x))


def test_autocast_runs_pytorchs_convolution():
    ours, theirs = make()
    x = torch.randn(MAPS)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = pytorchs(ours, x), theirs(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    for module, result in ((ours, out), (theirs, expected)):
        result.float().square().sum().backward()
        assert module.weight.grad.dtype == torch.float32
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("shape", [(CHANNELS, SIZE, SIZE), (0, CHANNELS, SIZE, SIZE)])
def test_unbatched_and_empty_input(shape):
    ours, theirs = make()
    x = torch.randn(shape)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, CHANNELS + 1, SIZE, SIZE),
        torch.randn(2, CHANNELS, 1, 900),
        torch.randn(2, SIZE),
    ],
)
def test_bad_input_gets_pytorchs_message(x):
    ours, theirs = make(padding=0)
    messages = []
    for module in (ours, theirs):
        with pytest.raises(RuntimeError) as error:
            module(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_copies_and_pickles():
    ours, _ = make()
    x = torch.randn(MAPS)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is dlkernels.nn.Conv2d
        assert torch.equal(again(x), ours(x))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "x and weight"])
def test_frozen_tensors(frozen):
    ours, theirs = make()
    results = []
    for module in (ours, theirs):
        torch.manual_seed(2)
        x = torch.randn(MAPS, requires_grad="x" not in frozen.split())
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in frozen.split())
        module(x).square().sum().backward()
        results.append([x.grad, module.weight.grad, module.bias.grad])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or relative_error(a, b) < 1e-5


def test_parametrized_weights():
    ours, theirs = make()
    for module in (ours, theirs):
        nn.utils.parametrizations.weight_norm(module)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(MAPS)
    with counted() as calls:
        out = ours(x)
    assert calls.call_count == 1
    expected = theirs(x)
    assert relative_error(out, expected) < 1e-6
    for module, result in ((ours, out), (theirs, expected)):
        result.square().sum().backward()
        module.grads = [parameter.grad for parameter in module.parameters()]
    for a, b in zip(ours.grads, theirs.grads, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("memory_format", FORMATS)
def test_compile(memory_format):
    ours, eager = make()
    eager.__class__ = dlkernels.nn.Conv2d
    x = torch.randn(MAPS).contiguous(memory_format=memory_format)
    out = torch.compile(ours, fullgraph=True)(x)
    expected = eager(x)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert relative_error(ours.weight.grad, eager.weight.grad) < 1e-6


def test_compile_under_autocast():
    ours, _ = make()
    x = torch.randn(MAPS)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(ours, fullgraph=True, backend="eager")(x)
        assert torch.equal(out, ours(x))
    assert out.dtype == torch.bfloat16


def test_symbolic_trace():
    ours, theirs = make()
    traced = torch.fx.symbolic_trace(nn.Sequential(ours), {"x": torch.fx.PH})
    x = torch.randn(MAPS)
    assert torch.equal(traced(x), theirs(x))


def test_export():
    ours, theirs = make()
    x = torch.randn(MAPS)
    program = torch.export.export(ours, (x,))
    assert not any("dlkernels" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), theirs(x))
    traced = torch.jit.trace(ours, (x,))
    assert torch.equal(traced(x), theirs(x))


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    ours, _ = make(padding="same")
    ours.eval()
    x = torch.randn(MAPS)
    path = tmp_path / "conv.onnx"
    torch.onnx.export(ours, (x,), path, input_names=["x"], verbose=False)
    (out,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    assert relative_error(torch.from_numpy(out), ours(x).detach()) < 1e-6


def test_padding_of():
    for padding, expected in {0: 0, 2: 2, "same": 1, "valid": 0, (1, 2): -1}.items():
        assert padding_of(nn.Conv2d(4, 4, 3, padding=padding)) == expected
