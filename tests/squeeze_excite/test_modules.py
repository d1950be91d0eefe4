"""nn.SqueezeExcite takes the place, and the state dict, of other libraries' modules."""

import pytest
import timm.layers
import timm.models._efficientnet_blocks as timm_blocks
import torch
from torchvision.ops.misc import SqueezeExcitation

import dlkernels.nn
from tests.numbers import assert_exact, relative_error


class SELayer(torch.nn.Module):
    """The module that most hand-written SE networks use."""

    def __init__(self, channel, reduction=16):
        super().__init__()
        self.avg_pool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Sequential(
            torch.nn.Linear(channel, channel // reduction, bias=False),
            torch.nn.ReLU(inplace=True),
            torch.nn.Linear(channel // reduction, channel, bias=False),
            torch.nn.Sigmoid(),
        )

    def forward(self, x):
        b, c = x.shape[:2]
        return x * self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)


PEERS = {
    "torchvision": (
        lambda: SqueezeExcitation(32, 8),
        lambda: dlkernels.nn.SqueezeExcite(32, 8),
    ),
    "torchvision hard sigmoid": (
        lambda: SqueezeExcitation(32, 8, scale_activation=torch.nn.Hardsigmoid),
        lambda: dlkernels.nn.SqueezeExcite(32, 8, gate="hard_sigmoid"),
    ),
    "timm SEModule": (
        lambda: timm.layers.SEModule(32, rd_channels=8),
        lambda: dlkernels.nn.SqueezeExcite(32, 8),
    ),
    "timm SqueezeExcite": (
        lambda: timm_blocks.SqueezeExcite(32, rd_channels=8, act_layer=torch.nn.SiLU),
        lambda: dlkernels.nn.SqueezeExcite(32, 8, activation="silu", style="timm"),
    ),
    "SELayer": (
        lambda: SELayer(32, 4),
        lambda: dlkernels.nn.SqueezeExcite(32, 8, bias=False, style="selayer"),
    ),
}


@pytest.mark.parametrize("peer", PEERS)
def test_drop_in(peer):
    theirs, ours = (make() for make in PEERS[peer])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 32, 9, 7)
    x1, x2 = x.clone().requires_grad_(), x.double().requires_grad_()
    out, expected = ours(x1), theirs.double()(x2)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_exact("out", out, expected, 63)
    assert_exact("gradient of x", x1.grad, x2.grad, 63)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_exact(name, a.grad, b.grad, 63)


@pytest.mark.parametrize("style", ["torchvision", "timm", "selayer"])
def test_onnx(style, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    module = dlkernels.nn.SqueezeExcite(16, 4, style=style).eval()
    x = torch.randn(2, 16, 6, 6)
    path = tmp_path / "se.onnx"
    torch.onnx.export(module, (x,), path, input_names=["x"], verbose=False)
    session = onnxruntime.InferenceSession(path)
    (out,) = session.run(None, {"x": x.numpy()})
    assert relative_error(torch.from_numpy(out), module(x).detach()) < 1e-6


def test_residual_form():
    module = dlkernels.nn.SqueezeExcite(16, 4, output_activation="relu")
    x, shortcut = torch.randn(2, 2, 16, 5, 5)
    plain = SqueezeExcitation(16, 4)
    plain.load_state_dict(module.state_dict())
    assert relative_error(module(x, shortcut), torch.relu(plain(x) + shortcut)) < 1e-6
