"""What accelerate() finds in hand-written modules, by proof, and what it leaves."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import dlkernels
from dlkernels.nn import ASFF, BatchNormAct2d, DenseBlock, SqueezeExcite
from tests.numbers import relative_error


def accelerated(module, *inputs):
    """The report for a model of this one module, whose results must not change."""
    model = nn.ModuleDict({"it": module.train()})
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = module(*inputs)
    report = dlkernels.accelerate(model)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert relative_error(model["it"](*inputs), expected) < 1e-5
    return model["it"], report


# ---- squeeze-and-excitation ----------------------------------------------------------------------


class SELayer(nn.Module):
    def __init__(self, channel, reduction=4, bias=False):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=bias),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=bias),
            nn.Sigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class ConvolutionalSELayer(nn.Module):
    def __init__(self, channel):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.layers = nn.Sequential(
            nn.Conv2d(channel, 4, 1), nn.SiLU(), nn.Conv2d(4, channel, 1), nn.Hardsigmoid()
        )

    def forward(self, x):
        return self.layers(self.pool(x)) * x


class GateOnly(SELayer):
    def forward(self, x):
        b, c, _, _ = x.size()
        return self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)


class DependsOnData(SELayer):
    def forward(self, x):
        return super().forward(x) if x.mean() < 100 else x


class DependsOnMode(SELayer):
    def forward(self, x):
        return super().forward(x) if self.training else x


@pytest.mark.parametrize("make", [SELayer, ConvolutionalSELayer, lambda c: SELayer(c, bias=True)])
def test_the_classic_squeeze_excite_is_proven(make):
    module, _ = accelerated(make(16), torch.randn(2, 16, 6, 6))
    assert isinstance(module, SqueezeExcite)


@pytest.mark.parametrize(
    ("make", "word"),
    [(GateOnly, "formula"), (DependsOnData, "branches on data"), (DependsOnMode, "formula")],
)
def test_what_only_looks_like_it_is_left(make, word):
    _, report = accelerated(make(16), torch.randn(2, 16, 6, 6))
    assert not report.swapped
    assert word in report.left["it"]


def test_subclasses():
    class Same(torchvision.ops.SqueezeExcitation):
        def __init__(self, channels):
            super().__init__(channels, 4)

    class Other(torchvision.ops.SqueezeExcitation):
        def _scale(self, input):
            return 2 * super()._scale(input)

    module, _ = accelerated(Same(16), torch.randn(2, 16, 6, 6))
    assert isinstance(module, SqueezeExcite)
    _, report = accelerated(Other(16, 4), torch.randn(2, 16, 6, 6))
    assert "defines _scale" in report.left["it"]


def test_the_proof_changes_neither_module_nor_random_numbers():
    model = nn.Sequential(SELayer(16))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert dlkernels.accelerate(model).swapped
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


# ---- dense blocks --------------------------------------------------------------------------------


class OldDenseLayer(nn.Sequential):
    """A layer as the first DenseNets for PyTorch have it: it returns all channels."""

    def __init__(self, channels, growth, drop=0.0):
        width = 2 * growth
        super().__init__(
            OrderedDict(
                norm1=nn.BatchNorm2d(channels),
                relu1=nn.ReLU(inplace=True),
                conv1=nn.Conv2d(channels, width, 1, bias=False),
                norm2=nn.BatchNorm2d(width),
                relu2=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(width, growth, 3, padding=1, bias=False),
                **({"drop": nn.Dropout(drop)} if drop else {}),
            )
        )

    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


class NewDenseLayer(OldDenseLayer):
    """A layer that takes the list of all maps before it, as torchvision's."""

    def forward(self, features):
        return nn.Sequential.forward(self, torch.cat(features, 1))


class ListDenseBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(NewDenseLayer(8 + 4 * i, 4) for i in range(3))

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class NewOnly(ListDenseBlock):
    def forward(self, x):
        return super().forward(x)[:, x.shape[1] :]


def old_block(drop=0.0):
    return nn.Sequential(*(OldDenseLayer(8 + 4 * i, 4, drop) for i in range(3)))


@pytest.mark.parametrize("make", [old_block, ListDenseBlock])
def test_hand_written_dense_blocks_are_proven(make):
    module, report = accelerated(make(), torch.randn(2, 8, 6, 6))
    assert list(report.swapped) == ["it"]
    assert any(isinstance(child, DenseBlock) for child in module.modules())


@pytest.mark.parametrize(
    ("make", "word"), [(NewOnly, "formula"), (lambda: old_block(0.5), "dropout")]
)
def test_other_dense_blocks_are_left(make, word):
    model = nn.Sequential(make())
    assert word in dlkernels.accelerate(model).left["0"]


def test_memory_is_that_of_dense_blocks():
    for memory in ("balanced", "minimal"):
        model = nn.Sequential(torchvision.models.densenet._DenseBlock(2, 8, 2, 4, 0.0))
        dlkernels.accelerate(model, memory=memory)
        assert model[0].memory == memory
    with pytest.raises(ValueError, match="memory"):
        dlkernels.accelerate(model, memory="none")


# ---- batch norm and activation -------------------------------------------------------------------


class Block(nn.Module):
    """A convolution with norm and activation, in a forward of its own."""

    def __init__(self, activation):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.activation = nn.Identity(), activation

    def forward(self, x):
        return self.activation(self.drop(self.norm(self.conv(x))))


class Twice(Block):
    def forward(self, x):
        return super().forward(super().forward(x))


class Functional(Block):
    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Shared(Block):
    def forward(self, x):
        return self.activation(super().forward(x) + x)


class ReadTwice(Block):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.activation(y) + y


class OnlyInTraining(Block):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.activation(y) if self.training else y


class Branches(Block):
    def forward(self, x):
        return super().forward(x) if x.sum() != 0 else x


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(True), nn.ReLU6(), nn.LeakyReLU(0.3), nn.SiLU(), nn.Hardswish(), nn.Mish()],
    ids=lambda module: type(module).__name__,
)
def test_norm_and_activation(activation):
    x = torch.randn(2, 8, 6, 6)
    sequence, report = accelerated(nn.Sequential(nn.BatchNorm2d(8), activation), x)
    assert list(report.swapped) == ["it.0", "it.1"]
    assert isinstance(sequence[0], BatchNormAct2d)
    block, report = accelerated(Block(activation), x)
    assert list(report.swapped) == ["it.norm", "it.activation"]
    assert isinstance(block.norm, BatchNormAct2d)
    report.restore()
    assert block.activation is activation


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Block(nn.GELU()), "GELU"),
        (lambda: Functional(nn.ReLU()), "the call relu"),
        (lambda: Shared(nn.ReLU()), "serves 2 places"),
        (lambda: Branches(nn.ReLU()), "cannot be traced"),
        (lambda: Twice(nn.ReLU()), None),
        (lambda: ReadTwice(nn.ReLU()), None),
        (lambda: OnlyInTraining(nn.ReLU()), None),
    ],
)
def test_pairs_that_are_none_are_left(make, word):
    _, report = accelerated(make(), torch.randn(2, 8, 6, 6))
    assert not report.swapped
    assert word is None or word in report.left["it.norm"]


def test_the_trace_leaves_no_trace():
    class Remembers(Block):
        def forward(self, x):
            self.last = self.norm(self.conv(x))
            return self.activation(self.last)

    block = Remembers(nn.ReLU())
    block.last = "what was there"
    assert dlkernels.accelerate(nn.Sequential(block)).swapped
    assert block.last == "what was there"


def test_a_traced_model():
    model = torch.fx.symbolic_trace(torchvision.models.mobilenet_v2().eval())
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    report = dlkernels.accelerate(model)
    assert isinstance(model.get_submodule("features.0.1"), BatchNormAct2d)
    assert relative_error(model(x), expected) < 1e-4
    report.restore()
    assert torch.equal(model(x), expected)


# ---- ASFF ----------------------------------------------------------------------------------------


class PublishedASFF(nn.Module):
    """The steps of the published module, which enlarges coarser maps before it weighs them."""

    def __init__(self, level, channels=(16, 8, 8), vis=False):
        super().__init__()
        template = ASFF(level, channels, out_channels=8, weight_channels=4)
        for name, layer in template.named_children():
            self.add_module(name, layer)
        self.level, self.vis = level, vis

    def forward(self, x_level_0, x_level_1, x_level_2):
        resized = []
        for index, x in enumerate((x_level_0, x_level_1, x_level_2)):
            if index < self.level:
                if hasattr(self, f"compress_level_{index}"):
                    x = getattr(self, f"compress_level_{index}")(x)
                x = F.interpolate(x, scale_factor=2 ** (self.level - index), mode="nearest")
            elif index > self.level:
                if index - self.level == 2:
                    x = F.max_pool2d(x, 3, stride=2, padding=1)
                x = getattr(self, f"stride_level_{index}")(x)
            resized.append(x)
        weights = [getattr(self, f"weight_level_{i}")(x) for i, x in enumerate(resized)]
        weights = F.softmax(self.weight_levels(torch.cat(weights, 1)), dim=1)
        fused = sum(x * weights[:, i : i + 1] for i, x in enumerate(resized))
        out = self.expand(fused)
        return (out, weights) if self.vis else out


class SumsWithoutSoftmax(PublishedASFF):
    def forward(self, x_level_0, x_level_1, x_level_2):
        return super().forward(x_level_0, x_level_1, x_level_2) * 2


@pytest.mark.parametrize("level", [0, 1, 2])
def test_asff(level):
    levels = [torch.randn(2, c, 2 << i, 2 << i) for i, c in enumerate((16, 8, 8))]
    module, _ = accelerated(PublishedASFF(level), *levels)
    assert isinstance(module, ASFF)


def test_other_asff_is_left():
    model = nn.ModuleDict({"vis": PublishedASFF(1, vis=True), "other": SumsWithoutSoftmax(1)})
    report = dlkernels.accelerate(model)
    assert "fusion weights" in report.left["vis"]
    assert "formula" in report.left["other"]
    assert type(model["vis"]) is PublishedASFF
