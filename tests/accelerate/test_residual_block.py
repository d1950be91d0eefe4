"""accelerate() swaps residual blocks as a whole where they are known to compute the same."""

import pytest
import timm
import timm.models.regnet as timm_regnet
import timm.models.resnet as timm_resnet
import timm.models.senet as timm_senet
import torch
from timm.layers import BlurPool2d, DropBlock2d, DropPath, GroupNormAct, SEModule, SplitBatchNorm2d
from torch import nn
from torchvision.models import regnet, resnet

import dlkernels
from dlkernels.nn import BatchNormAct2d, Conv2d, ResidualBlock, SqueezeExcite
from tests.models.test_senet import randomized
from tests.numbers import FORMATS, relative_error
from tests.residual_block.cases import CHANNELS, SWAPPED, make_maps


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", SWAPPED)
def test_swapped(name, training, memory_format):
    block = randomized(SWAPPED[name]()).train(training)
    model = nn.ModuleDict({"it": block})
    keys = list(model.state_dict())
    parameters = dict(model.named_parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = make_maps(memory_format)

    def results():
        model.load_state_dict(state)
        out = model["it"](x)
        grads = torch.autograd.grad(out.square().sum(), [x, *model.parameters()])
        return out, grads, [buffer.clone() for buffer in model.buffers()]

    expected, expected_grads, expected_buffers = results()
    report = dlkernels.accelerate(model)
    assert not report.left
    assert type(model["it"]) is ResidualBlock
    assert list(model.state_dict()) == keys
    assert list(dict(model.named_parameters())) == list(parameters)  # an optimizer's order
    assert all(parameters[key] is value for key, value in model.named_parameters())
    actual, grads, buffers = results()
    assert relative_error(actual, expected) < 1e-5
    # To the largest of all: a convolution before a norm may have no gradient but rounding.
    largest = max(grad.norm() for grad in expected_grads)
    for a, b in zip(grads, expected_grads, strict=True):
        assert (a - b).norm() < 1e-4 * largest
    for a, b in zip(buffers, expected_buffers, strict=True):
        assert relative_error(a, b) < 1e-5
    report.restore()
    assert model["it"] is block
    assert torch.equal(results()[0], expected)


class SkipsItsShortcut(resnet.BasicBlock):
    def forward(self, x):
        return super().forward(x) - x


class Renamed(resnet.BasicBlock):
    def __init__(self):
        super().__init__(CHANNELS, CHANNELS)


def changed(change, make=lambda: resnet.BasicBlock(CHANNELS, CHANNELS)):
    def result():
        block = make()
        change(block)
        return block

    return result


def timm_block(**options):
    return timm_resnet.Bottleneck(CHANNELS, CHANNELS // 4, **options)


def timm_regnet_block(**options):
    return timm_regnet.Bottleneck(CHANNELS, CHANNELS, group_size=16, **options)


LEFT = {
    "a subclass": (lambda: SkipsItsShortcut(CHANNELS, CHANNELS), "defines forward"),
    "a hook": (changed(lambda b: b.bn1.register_forward_hook(lambda *_: None)), "hooks"),
    "another norm": (
        lambda: resnet.BasicBlock(CHANNELS, CHANNELS, norm_layer=lambda c: nn.GroupNorm(4, c)),
        "bn1 is .*GroupNorm, no batch norm",
    ),
    "another convolution": (
        changed(lambda b: setattr(b, "conv2", nn.Identity())),
        "conv2 is .*, no nn.Conv2d",
    ),
    "a bias": (
        changed(lambda b: setattr(b, "conv1", nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))),
        "conv1 has a bias",
    ),
    "padding of another kind": (
        changed(lambda b: setattr(b.conv1, "padding_mode", "reflect")),
        "conv1 .*does not pad",
    ),
    "another activation": (
        changed(lambda b: setattr(b, "relu", nn.Tanh())),
        "activation is .*Tanh",
    ),
    "another output activation": (
        lambda: timm_block(act_layer=nn.SiLU),
        "output activation is .*SiLU",
    ),
    "anti-aliasing": (
        lambda: timm_block(aa_layer=BlurPool2d, stride=2),
        "anti-aliasing",
    ),
    "DropBlock": (lambda: timm_block(drop_block=DropBlock2d), "DropBlock"),
    "stochastic depth": (lambda: timm_block(drop_path=DropPath(0.1)), "stochastic depth"),
    "stochastic depth of a RegNet": (
        lambda: timm_regnet_block(drop_path_rate=0.1),
        "stochastic depth",
    ),
    "no shortcut": (
        lambda: timm_regnet.Bottleneck(CHANNELS, 64, group_size=16, downsample=None),
        "no shortcut",
    ),
    "other attention": (lambda: timm_block(attn_layer="eca"), "se is .*unknown attention"),
    "SE with a max pool": (
        lambda: timm_block(attn_layer=lambda c, **_: SEModule(c, add_maxpool=True)),
        "max pool",
    ),
    "norms of other kinds": (
        lambda: timm_regnet_block(norm_layer=GroupNormAct),
        "no batch norm",
    ),
    "a norm of parts of the batch": (lambda: timm_block(norm_layer=SplitBatchNorm2d), "no batch"),
    "more parameters": (
        changed(lambda b: b.register_parameter("scale", nn.Parameter(torch.ones(1)))),
        "other parameters",
    ),
    "a folder that does more": (
        changed(
            lambda b: setattr(b.f, "a", nn.ModuleList(b.f.a.children())),
            lambda: regnet.ResBottleneckBlock(
                CHANNELS, CHANNELS, 1, nn.BatchNorm2d, nn.ReLU, 16, 1.0, None
            ),
        ),
        "f.a is .*ModuleList",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name):
    make, reason = LEFT[name]
    model = nn.ModuleDict({"it": make()})
    report = dlkernels.accelerate(model)
    assert not isinstance(model["it"], ResidualBlock)
    import re

    assert re.search(reason, report.left["it"]), report.left["it"]


def test_a_subclass_that_computes_the_same():
    model = nn.Sequential(Renamed())
    dlkernels.accelerate(model)
    assert type(model[0]) is ResidualBlock


def test_what_is_inside_a_block_that_is_left_is_swapped():
    model = nn.Sequential(
        timm_resnet.BasicBlock(CHANNELS, CHANNELS, attn_layer=SEModule, drop_path=DropPath(0.1))
    )
    report = dlkernels.accelerate(model)
    assert "stochastic depth" in report.left["0"]
    assert isinstance(model[0].bn1, BatchNormAct2d)
    assert isinstance(model[0].conv1, Conv2d)
    assert isinstance(model[0].se, SqueezeExcite)


def test_a_relu_before_squeeze_and_excitation_is_no_known_block():
    model = nn.Sequential(timm_senet.SEResNetBlock(CHANNELS, CHANNELS, 1, 4))
    dlkernels.accelerate(model)
    assert type(model[0]) is timm_senet.SEResNetBlock


def test_frozen_norms_stay_frozen():
    model = nn.Sequential(resnet.Bottleneck(CHANNELS, CHANNELS // 4)).train()
    model[0].bn2.eval()
    dlkernels.accelerate(model)
    assert model[0].training
    assert model[0].bn1.training
    assert not model[0].bn2.training


@pytest.mark.parametrize("name", ["torchvision resnet18", "timm seresnet18", "timm regnety_002"])
def test_whole_networks_are_verified(name):
    library, name = name.split()
    make = timm.create_model if library == "timm" else getattr(resnet, name)
    model = make(name) if library == "timm" else make()
    report = dlkernels.accelerate(model, torch.randn(2, 3, 64, 64))
    assert report.comparisons
    blocks = [old for old in report.swapped.values() if "Block" in type(old).__name__]
    blocks += [old for old in report.swapped.values() if "Bottleneck" in type(old).__name__]
    assert len(blocks) == (13 if name == "regnety_002" else 8)
