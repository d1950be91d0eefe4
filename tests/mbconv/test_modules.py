"""nn.MBConv and nn.DepthwiseConvBNAct take the place, and the state dict, of other blocks."""

import copy
from functools import partial

import pytest
import timm.models._efficientnet_blocks as timm_blocks
import torch
from timm.layers import BatchNormAct2d as TimmNorm
from torch import nn
from torchvision.models.efficientnet import MBConv, MBConvConfig
from torchvision.ops import Conv2dNormActivation

import dlkernels.nn
from dlkernels.mbconv import block, modules
from tests.models.test_senet import randomized
from tests.numbers import FORMATS, relative_error

NORM = partial(nn.BatchNorm2d, eps=1e-5)


def torchvision_block(expansion):
    config = MBConvConfig(expansion, 5, 1, 16, 16, 1, 1.0, 1.0)
    return MBConv(config, stochastic_depth_prob=0.0, norm_layer=NORM)


def timm_block(kind, **options):
    se = partial(timm_blocks.SqueezeExcite, rd_ratio=0.25)
    return kind(16, 24, 3, 2, act_layer=nn.SiLU, norm_layer=TimmNorm, se_layer=se, **options)


def ours(out_channels, expand_channels, size, stride, squeezed, **options):
    return dlkernels.nn.MBConv(
        16, out_channels, expand_channels, size, stride, squeeze_channels=squeezed, **options
    )


PEERS = {
    "torchvision": (lambda: torchvision_block(4), lambda: ours(16, 64, 5, 1, 4)),
    "torchvision without expansion": (
        lambda: torchvision_block(1),
        lambda: ours(16, 16, 5, 1, 4),
    ),
    "timm InvertedResidual": (
        lambda: timm_block(timm_blocks.InvertedResidual, exp_ratio=4.0),
        lambda: ours(24, 64, 3, 2, 16, style="timm"),
    ),
    "timm DepthwiseSeparableConv": (
        lambda: timm_block(timm_blocks.DepthwiseSeparableConv),
        lambda: ours(24, 16, 3, 2, 4, style="timm"),
    ),
    "timm with TensorFlow's padding": (
        lambda: timm_block(timm_blocks.InvertedResidual, exp_ratio=4.0, pad_type="same"),
        lambda: ours(24, 64, 3, 2, 16, style="timm", padding="same"),
    ),
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("peer", PEERS)
def test_drop_in(peer, training, memory_format):
    theirs, mine = (randomized(make()).train(training) for make in PEERS[peer])
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.double()
    x = torch.randn(3, 16, 12, 9).contiguous(memory_format=memory_format)
    x1, x2 = x.clone().requires_grad_(), x.double().requires_grad_()
    out, expected = mine(x1), theirs(x2)
    weights = torch.randn(out.shape)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert relative_error(out, expected) < 1e-5
    assert relative_error(x1.grad, x2.grad) < 1e-4
    exact = dict(theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        if exact[name].grad.norm() > 1e-9:
            assert relative_error(parameter.grad, exact[name].grad) < 1e-4, name
    buffers = dict(theirs.named_buffers())
    for name, buffer in mine.named_buffers():
        assert relative_error(buffer, buffers[name]) < 1e-6, name


@pytest.mark.parametrize("memory_format", FORMATS)
def test_inference_without_gradients(memory_format):
    block = randomized(ours(16, 64, 3, 1, 4)).eval()
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=memory_format)
    expected = block(x)
    with torch.no_grad():
        out = block(x)
    assert out.is_contiguous(memory_format=memory_format)
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("training", [False, True])
def test_whole_block_in_one_op(training, monkeypatch):
    """In evaluation without gradients, and not with batch statistics."""
    calls = []
    monkeypatch.setattr(modules, "run_kernel", lambda *a: calls.append(a) or block.run_kernel(*a))
    network = randomized(ours(16, 64, 3, 1, 4)).train(training)
    x = torch.randn(2, 16, 9, 9)
    network(x)
    assert not calls
    with torch.no_grad():
        network(x)
    assert len(calls) == (0 if training else 1)


def test_nothing_is_stale():
    """After any change of parameters or buffers, outputs are those of a fresh block."""
    block = randomized(ours(16, 64, 3, 1, 4)).eval()
    x = torch.randn(2, 16, 9, 9)

    def step():
        optimizer = torch.optim.SGD(block.parameters(), 0.1)
        block.train()(x).square().sum().backward()
        optimizer.step()
        block.eval()

    other = randomized(ours(16, 64, 3, 1, 4))
    changes = {
        "load_state_dict": lambda: block.load_state_dict(other.state_dict()),
        "optimizer step": step,
        "buffer in place": lambda: block.part("depthwise_norm").running_var.mul_(2),
        "double": lambda: block.double(),
        "back to float": lambda: block.float(),
        "bfloat16": lambda: block.bfloat16(),
    }
    for name, change in changes.items():
        with torch.no_grad():
            block(x.to(block.part("project").weight.dtype))
        change()
        fresh = ours(16, 64, 3, 1, 4).eval().to(block.part("project").weight.dtype)
        fresh.load_state_dict(block.state_dict())
        with torch.no_grad():
            values = x.to(block.part("project").weight.dtype)
            assert torch.equal(block(values), fresh(values)), name
            assert torch.equal(copy.deepcopy(block)(values), fresh(values)), name


def test_saved_for_backward():
    """The input and the raw outputs of expansion, depthwise convolution and projection."""
    block = ours(16, 64, 3, 1, 4)
    x = torch.randn(2, 16, 12, 12, requires_grad=True)
    saved = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t
    )
    with hooks:
        block(x)
    maps = sorted(t.numel() // (2 * 144) for t in saved.values() if t.numel() >= 2 * 16 * 144)
    assert maps == [16, 16, 64, 64]


def test_stochastic_depth():
    block = ours(16, 64, 3, 1, 4, drop_path=0.5).train()
    x = torch.randn(64, 16, 5, 5)
    dropped = [torch.equal(a, b) for a, b in zip(block(x), x, strict=True)]
    assert 10 < sum(dropped) < 54
    block.drop_path = 1.0
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    block = randomized(ours(16, 64, 3, 1, 4))
    x = torch.randn(2, 16, 9, 9)
    expected = copy.deepcopy(block)(x)
    with torch.autocast("cpu", dtype):
        out = block(x)
    out.float().sum().backward()
    assert out.dtype == dtype
    assert relative_error(out, expected) < 3e-2
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


def test_compile_without_graph_breaks():
    block = randomized(ours(16, 64, 3, 1, 4)).eval()
    x = torch.randn(2, 16, 9, 9)
    expected = block(x)
    assert relative_error(torch.compile(block, fullgraph=True)(x), expected) < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_in_float64(training):
    block = randomized(dlkernels.nn.MBConv(3, 3, 4, squeeze_channels=2)).double().train(training)
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))
    assert torch.autograd.gradgradcheck(block, (x,))


def test_depthwise_conv_bn_act():
    theirs = Conv2dNormActivation(16, 16, 5, 2, groups=16, activation_layer=nn.Hardswish)
    mine = dlkernels.nn.DepthwiseConvBNAct(16, 5, 2, activation="hardswish")
    mine.load_state_dict(randomized(theirs).state_dict(), strict=True)
    x = torch.randn(2, 16, 9, 9)
    assert relative_error(mine(x), theirs(x)) < 1e-5
    assert relative_error(mine.get_submodule("1").running_var, theirs[1].running_var) < 1e-6
    assert relative_error(mine.eval()(x), theirs.eval()(x)) < 1e-5


def test_bad_names():
    for options in ({"activation": "tanh"}, {"gate": "tanh"}, {"style": "keras"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be one of"):
            ours(16, 64, 3, 1, 4, **options)
    with pytest.raises(ValueError, match="padding must be one of 'same'"):
        ours(16, 64, 3, 1, 4, padding="valid")
