"""timm's state dicts load, and give timm's outputs and gradients."""

import pytest
import timm
import torch

from dlkernels import models
from tests.numbers import relative_error

SAME_KEYS = [
    "seresnet18",
    "seresnet34",
    "seresnet50",
    "seresnet101",
    "seresnet152",
    "seresnext50_32x4d",
    "seresnext101_32x4d",
]


def randomized(model):
    """Makes batch norm statistics matter and the outputs stay of order one."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.mark.parametrize("name", SAME_KEYS)
def test_timm_state_dict(name):
    theirs = randomized(timm.create_model(name, num_classes=10)).eval().double()
    ours = getattr(models, name)(num_classes=10).eval().double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x)
        assert relative_error(ours(x), expected) < 1e-12
        assert relative_error(ours.float()(x.float()), expected) < 1e-4


def test_timm_senet154():
    theirs = randomized(timm.create_model("legacy_senet154", num_classes=10)).eval()
    ours = models.senet154(num_classes=10).eval()
    ours.load_state_dict(models.senet.from_timm_legacy(theirs.state_dict()), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-4


def test_training_gradients_equal_timm():
    theirs = randomized(timm.create_model("seresnet18", num_classes=10)).train()
    ours = models.seresnet18(num_classes=10).train()
    ours.load_state_dict(theirs.state_dict())
    theirs.double()
    x = torch.randn(4, 3, 64, 64)
    ours(x).logsumexp(1).sum().backward()
    theirs(x.double()).logsumexp(1).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, expected[name].grad) < 1e-3, name


def test_feature_sizes():
    features = models.seresnet18().eval().forward_features(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape[1:]) for f in features] == [
        (64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3),
    ]  # fmt: skip
