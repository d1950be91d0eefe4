"""nn.ASFF is the published module: keys, outputs, gradients and running statistics."""

import pytest
import torch

import dlkernels.nn
from tests.asff.published import PublishedASFF
from tests.numbers import FORMATS, assert_exact, relative_error

CHANNELS = {"published": (24, 12, 12), "free": (20, 16, 9)}


def make_pair(level, channels, **options):
    """The published module in float64 and ours, with the same weights."""
    theirs = PublishedASFF(level, channels, 14, 6)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -1, 1)
    ours = dlkernels.nn.ASFF(
        level, channels, out_channels=14, weight_channels=6, return_weights=True, **options
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.double(), ours


def make_levels(channels, samples=3, height=4, width=3):
    return [
        torch.randn(samples, c, height << i, width << i, requires_grad=True)
        for i, c in enumerate(channels)
    ]


def assert_same_statistics(ours, theirs):
    ours, theirs = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, buffer in ours.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(buffer, theirs[name])
        else:
            assert_exact(name, buffer, theirs[name], 16)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_training(level, channels, memory_format):
    theirs, ours = make_pair(level, channels)
    ours = ours.to(memory_format=memory_format)
    levels = make_levels(channels)
    doubles = [x.detach().double().requires_grad_() for x in levels]
    for _ in range(2):  # twice: the second step starts from other running statistics
        out, weights = ours(*(x.contiguous(memory_format=memory_format) for x in levels))
        expected, expected_weights = theirs(*doubles)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())

    assert_exact("out", out, expected, 256)
    assert_exact("weights", weights, expected_weights, 256)
    for index, (x, y) in enumerate(zip(levels, doubles, strict=True)):
        assert_exact(f"gradient of level {index}", x.grad, y.grad, 1024)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not name.endswith("weight_levels.bias"):  # its gradient is a sum that cancels
            assert_exact(name, a.grad, b.grad, 1024)
    assert_same_statistics(ours, theirs)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_evaluation(level):
    channels = CHANNELS["free"]
    theirs, ours = make_pair(level, channels)
    levels = [x.detach() for x in make_levels(channels)]
    theirs(*(x.double() for x in levels))
    ours(*levels)
    out, weights = ours.eval()(*levels)
    expected, expected_weights = theirs.eval()(*(x.double() for x in levels))
    assert_exact("out", out, expected, 256)
    assert_exact("weights", weights, expected_weights, 256)
    assert (weights.sum(1) - 1).abs().max() < 1e-6
    assert_same_statistics(ours, theirs)


@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("tracked", [True, False])
def test_running_statistics_of_other_batch_norms(momentum, tracked):
    channels = CHANNELS["free"]
    theirs, ours = make_pair(2, channels)
    for module in (*theirs.modules(), *ours.modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = momentum
            if not tracked:
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
    for _ in range(3):
        levels = [x.detach() for x in make_levels(channels)]
        out, _ = ours(*levels)
        expected, _ = theirs(*(x.double() for x in levels))
    assert_exact("out", out, expected, 256)
    assert_same_statistics(ours, theirs)


def test_other_norms_run_on_enlarged_maps():
    channels = CHANNELS["free"]
    theirs, ours = make_pair(2, channels)
    for module in (theirs, ours):
        for index in range(3):
            norm = torch.nn.GroupNorm(2, 6).to(next(module.parameters()).dtype)
            module.get_submodule(f"weight_level_{index}").batch_norm = norm
    levels = [x.detach() for x in make_levels(channels)]
    out, _ = ours(*levels)
    expected, _ = theirs(*(x.double() for x in levels))
    assert_exact("out", out, expected, 256)


def test_published_sizes():
    for level, width in enumerate((1024, 512, 256)):
        module = dlkernels.nn.ASFF(level)
        keys = {key.split(".")[0] for key in module.state_dict()}
        resizing = {
            0: {"stride_level_1", "stride_level_2"},
            1: {"compress_level_0", "stride_level_2"},
            2: {"compress_level_0"},
        }[level]
        branch = {"weight_level_0", "weight_level_1", "weight_level_2", "weight_levels"}
        assert keys == resizing | branch | {"expand"}
        assert module.expand.conv.out_channels == width
        assert isinstance(module.expand.leaky, torch.nn.LeakyReLU)


def test_relu6():
    module = dlkernels.nn.ASFF(1, (8, 8, 8), activation="relu6", out_channels=8)
    out = module(*make_levels((8, 8, 8)))
    assert out.min() == 0
    assert out.max() <= 6
    assert isinstance(module.weight_level_2.relu6, torch.nn.ReLU6)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_onnx(level, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    channels = (8, 8, 8)
    module = dlkernels.nn.ASFF(level, channels, out_channels=8).eval()
    levels = tuple(x.detach() for x in make_levels(channels))
    path = tmp_path / "asff.onnx"
    names = ["level_0", "level_1", "level_2"]
    torch.onnx.export(module, levels, path, input_names=names, verbose=False)
    session = onnxruntime.InferenceSession(path)
    feed = dict(zip(names, (x.numpy() for x in levels), strict=True))
    (out,) = session.run(None, feed)
    assert relative_error(torch.from_numpy(out), module(*levels).detach()) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 3}, "level must be 0, 1 or 2, but is 3"),
        ({"level": 0, "channels": (8, 8)}, r"channels must hold 3 widths, but is \(8, 8\)"),
        ({"level": 0, "activation": "gelu"}, "activation must be one of 'leaky_relu', 'relu6'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        dlkernels.nn.ASFF(**arguments)


@pytest.mark.parametrize("shape", [(2, 8, 8, 7), (2, 7, 8, 6), (3, 8, 8, 6), (2, 8, 8)])
def test_bad_levels(shape):
    levels = make_levels((8, 8, 8), samples=2)
    levels[1] = torch.randn(shape)
    with pytest.raises(ValueError, match="level_1 must have shape"):
        dlkernels.nn.ASFF(2, (8, 8, 8))(*levels)
