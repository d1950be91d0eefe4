"""The modules take the place, and the state dict, of torchvision's and timm's."""

import pytest
import timm.models.densenet as timm_densenet
import torch
import torchvision.models.densenet as torchvision_densenet

from dlkernels import nn, ops
from tests.dense_block.cases import Shape, make_layers
from tests.numbers import assert_exact, relative_error

BLOCKS = {
    "torchvision": lambda: torchvision_densenet._DenseBlock(3, 16, 4, 8, 0.0),
    "timm": lambda: timm_densenet.DenseBlock(3, 16, 4, 8),
}
TRANSITIONS = {
    "torchvision": lambda: torchvision_densenet._Transition(24, 10),
    "timm": lambda: timm_densenet.DenseTransition(24, 10),
}


def randomise(module):
    """Norms that shift, so that few values lie near the ReLU's kink (see cases.make_layers)."""
    for child in module.modules():
        if isinstance(child, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(child.weight, 0.5, 1.5)
            child.bias.data = torch.where(torch.rand_like(child.bias) < 0.5, -2.0, 2.0)
    return module


def assert_same_step(ours, theirs, x, length):
    """One step of both in their modes, ours against theirs in float64."""
    theirs.double()
    x1, x2 = x.clone().requires_grad_(), x.double().requires_grad_()
    out, expected = ours(x1), theirs(x2)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    assert_exact("out", out, expected, length)
    assert_exact("gradient of x", x1.grad, x2.grad, length)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_exact(name, a.grad, b.grad, length)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert_exact(name, a.float(), b.double(), length)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("peer", BLOCKS)
def test_dense_block(peer, training):
    theirs = randomise(BLOCKS[peer]()).train(training)
    ours = nn.DenseBlock(3, 16, 4, 8).train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_step(ours, theirs, torch.randn(4, 16, 9, 7), 3 * 400)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("peer", TRANSITIONS)
def test_transition(peer, training):
    theirs = randomise(TRANSITIONS[peer]()).train(training)
    ours = nn.Transition(24, 10).train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_step(ours, theirs, torch.randn(4, 24, 9, 6), 300)


def test_dense_layer():
    theirs = randomise(torchvision_densenet._DenseLayer(16, 8, 4, 0.0))
    ours = nn.DenseLayer(16, 8)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    parts = list(torch.randn(4, 16, 5, 6).split([4, 12], 1))
    wanted = theirs.double()([part.double() for part in parts])
    assert_exact("new channels", ours(parts), wanted, 300)


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_running_statistics_of_ten_steps(momentum):
    theirs = torchvision_densenet._DenseBlock(3, 16, 4, 8, 0.0)
    ours = nn.DenseBlock(3, 16, 4, 8)
    ours.load_state_dict(theirs.state_dict())
    for module in (*theirs.modules(), *ours.modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = momentum
    theirs.double()
    for _ in range(10):
        x = torch.randn(4, 16, 6, 5) * 2 + 1
        ours(x)
        theirs(x.double())
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        if name.endswith("num_batches_tracked"):
            assert a.item() == b.item() == 10
        else:
            assert_exact(name, a, b, 400)


@pytest.mark.parametrize("module", [nn.DenseBlock(2, 8, 4, 4), nn.Transition(8, 4)])
def test_a_refused_batch_changes_nothing(module):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="must have shape"):
        module(torch.randn(3, 7, 6, 5))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_norms_without_running_statistics():
    ours = nn.DenseBlock(2, 8, 4, 4)
    for module in ours.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
    x = torch.randn(3, 8, 6, 5)
    assert torch.equal(ours.train()(x), ours.eval()(x))


def test_frozen_norms_of_one_layer_run_in_plain_pytorch():
    theirs = randomise(torchvision_densenet._DenseBlock(3, 16, 4, 8, 0.0))
    ours = nn.DenseBlock(3, 16, 4, 8)
    ours.load_state_dict(theirs.state_dict())
    for block in (theirs, ours):
        block.denselayer1.norm1.eval()
    assert_same_step(ours, theirs, torch.randn(4, 16, 5, 6), 3 * 400)


@pytest.mark.parametrize("training", [True, False])
def test_dropout(training):
    block = nn.DenseBlock(2, 8, 4, 16, drop_rate=0.5).train(training)
    out = block(torch.randn(4, 8, 9, 8))
    share = (out[:, 8:] == 0).double().mean().item()
    assert 0.45 < share < 0.55 if training else share == 0


def test_compiled():
    block = nn.DenseBlock(2, 8, 4, 4)
    other = nn.DenseBlock(2, 8, 4, 4)
    other.load_state_dict(block.state_dict())
    x = torch.randn(3, 8, 6, 5)
    out = torch.compile(block, fullgraph=True)(x)
    assert relative_error(out, other(x)) < 1e-6
    for name, buffer in other.named_buffers():
        assert relative_error(block.get_buffer(name), buffer) < 1e-6, name
    assert block.denselayer1.norm1.num_batches_tracked.item() == 1


class Slices(torch.nn.Module):
    """The ops on slices, as a module."""

    def __init__(self):
        super().__init__()
        ((self.layer, _),) = make_layers(Shape(2, 4, 3, 3, 1, 1, 5))

    def forward(self, x):
        mean, variance = ops.channel_statistics(x, 1, 5)
        out = ops.bn_relu_conv1x1(x, self.layer, first=2, training=False)
        return (out - mean[:, None, None]) / (variance[:, None, None] + 1).sqrt()


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    block = nn.DenseBlock(2, 8, 4, 4)
    module = torch.nn.Sequential(block, nn.Transition(16, 6), Slices()).eval()
    x = torch.randn(2, 8, 6, 6)
    path = tmp_path / "dense.onnx"
    torch.onnx.export(module, (x,), path, input_names=["x"], verbose=False)
    (out,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    assert relative_error(torch.from_numpy(out), module(x).detach()) < 1e-5
