"""accelerate() makes 3x3 convolutions of enough channels run the op where it pays."""

from unittest import mock

import pytest
import torch
import torchvision
from torch import nn

import dlkernels
from dlkernels.conv3x3 import modules
from dlkernels.conv3x3.modules import MIN_CHANNELS
from dlkernels.nn import Conv2d, DenseBlock
from tests.numbers import assert_exact

CHANNELS = MIN_CHANNELS + 8


def conv(channels=CHANNELS, out=CHANNELS, kernel_size=3, **options):
    return nn.Conv2d(channels, out, kernel_size, **{"padding": 1, **options})


def test_parameters_keys_results_and_restore():
    model = nn.Sequential(conv(), nn.GELU(), conv(bias=False), conv(out=3)).eval()
    originals, parameters = list(model), dict(model.named_parameters())
    model[0].note = "an attribute of its own"
    x = torch.randn(2, CHANNELS, 24, 24)
    report = dlkernels.accelerate(model, x)
    assert report.swapped == {"0": originals[0], "2": originals[2]}
    assert not report.left
    assert report.comparisons
    assert [type(module) for module in model] == [Conv2d, nn.GELU, Conv2d, nn.Conv2d]
    assert list(model.state_dict()) == list(parameters)
    assert all(parameters[key] is value for key, value in model.named_parameters())
    assert not model[0].training
    assert model[0].note == originals[0].note

    with mock.patch.object(modules, "conv3x3", side_effect=modules.conv3x3) as calls:
        actual = model(x)
    assert calls.call_count == 2
    exact = nn.Sequential(*originals).double()(x.double())
    assert_exact("output", actual, exact, 9 * CHANNELS)

    model.train()
    assert report.restore() is model
    assert list(model) == originals
    assert all(module.training for module in originals)


def test_new_parameters_are_those_of_the_original_too():
    model = nn.Sequential(conv())
    report = dlkernels.accelerate(model)
    model[0].weight = weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3))
    assert report.restore()[0].weight is weight


@pytest.mark.parametrize(
    "make",
    [
        lambda: conv(channels=MIN_CHANNELS - 1),
        lambda: conv(out=MIN_CHANNELS - 1),
        lambda: conv(kernel_size=1, padding=0),
        lambda: conv(stride=2),
        lambda: conv(dilation=2),
        lambda: conv(groups=2),
        lambda: conv(padding=(0, 1)),
        lambda: conv(padding_mode="reflect"),
        lambda: conv().bfloat16(),
        lambda: conv().double(),
        lambda: type("Own", (nn.Conv2d,), {})(CHANNELS, CHANNELS, 3),
        lambda: nn.utils.parametrizations.weight_norm(conv()),
        lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3),
    ],
)
def test_others_are_none_of_its_business(make):
    report = dlkernels.accelerate(nn.Sequential(make()))
    assert not report.swapped
    assert not report.left


def test_a_model_on_meta_is_swapped():
    with torch.device("meta"):
        model = nn.Sequential(conv())
    dlkernels.accelerate(model)
    assert type(model[0]) is Conv2d
    assert model[0].weight.is_meta


def test_what_is_left_with_a_reason():
    model = nn.ModuleDict({"hooked": conv(), "replaced": conv(), "normed": conv()})
    model["hooked"].register_forward_hook(lambda *_: None)
    model["replaced"].forward = lambda x: x
    nn.utils.weight_norm(model["normed"])  # by a hook
    report = dlkernels.accelerate(model)
    assert not report.swapped
    assert "hooks" in report.left["hooked"]
    assert "replaced" in report.left["replaced"]
    assert "hooks" in report.left["normed"]
    assert "dlkernels.nn.Conv2d in its place" in str(dlkernels.accelerate(conv()))


def test_shared_modules_and_tied_weights():
    shared = conv()
    model = nn.Sequential(shared, nn.Sequential(shared), conv())
    model[2].weight = shared.weight
    report = dlkernels.accelerate(model)
    assert list(report.swapped) == ["0", "1.0", "2"]
    assert model[0] is model[1][0]
    assert model[2].weight is model[0].weight
    report.restore()
    assert model[0] is model[1][0] is shared


def test_twice_changes_nothing_more():
    model = nn.Sequential(conv())
    dlkernels.accelerate(model)
    again = dlkernels.accelerate(model)
    assert not again.swapped
    assert not again.left


def test_fused_blocks_keep_the_convolutions_inside():
    block = torchvision.models.densenet._DenseBlock(2, CHANNELS, 2, MIN_CHANNELS, 0.0)
    model = nn.Sequential(block, conv(channels=CHANNELS + 2 * MIN_CHANNELS))
    report = dlkernels.accelerate(model)
    assert list(report.swapped) == ["0", "1"]
    assert isinstance(model[0], DenseBlock)
    assert not any(isinstance(module, Conv2d) for module in model[0].modules())
