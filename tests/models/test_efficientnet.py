"""torchvision's and timm's state dicts load, and give their outputs and gradients."""

import pytest
import timm
import torch
import torchvision

from dlkernels import models
from dlkernels.measure import peak_cpu_memory
from dlkernels.models.efficientnet import PUBLISHED, EfficientNet, Scaling, from_timm
from tests.models.test_senet import randomized
from tests.numbers import FORMATS, relative_error

NAMES = [f"efficientnet_b{i}" for i in range(8)]
# Of 1000 classes; torchvision's documentation gives the same.
PARAMETERS = dict(
    zip(
        NAMES,
        (5288548, 7794184, 9109994, 12233232, 19341616, 30389784, 43040704, 66347960),
        strict=True,
    )
)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_keys(name):
    with torch.device("meta"):
        ours = getattr(models, name)()
        theirs = getattr(torchvision.models, name)()
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[name]
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


@pytest.mark.parametrize("memory_format", FORMATS)
def test_torchvision_inference(memory_format):
    theirs = randomized(torchvision.models.efficientnet_b0(num_classes=10)).eval()
    ours = models.efficientnet_b0(num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 96).contiguous(memory_format=memory_format)
    with torch.no_grad():
        out, expected = ours(x), theirs.double()(x.double())
        assert relative_error(out, expected) < 1e-5
        assert relative_error(ours.double()(x.double()), expected) < 1e-12


def test_timm_inference():
    theirs = randomized(timm.create_model("efficientnet_b0", num_classes=10)).eval()
    ours = models.efficientnet_b0(num_classes=10).eval()
    ours.load_state_dict(from_timm(theirs.state_dict()), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(ours(x), theirs.double()(x.double())) < 1e-5


@pytest.mark.parametrize("memory_format", FORMATS)
def test_training_equals_torchvision(memory_format):
    """Every parameter's gradient and every running statistic, through the whole network."""
    options = {"num_classes": 10, "dropout": 0.0, "stochastic_depth_prob": 0.0}
    theirs = randomized(torchvision.models.efficientnet_b0(**options)).train()
    ours = EfficientNet(PUBLISHED["b0"]._replace(dropout=0.0), num_classes=10, drop_path=0.0)
    ours.load_state_dict(theirs.state_dict())
    theirs.double()
    x = torch.randn(4, 3, 96, 96).contiguous(memory_format=memory_format)
    ours(x).logsumexp(1).sum().backward()
    theirs(x.double()).logsumexp(1).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        exact = expected[name].grad
        if exact.norm() < 1e-9:
            # A bias in front of a batch norm has no influence: what is left is rounding.
            assert parameter.grad.norm() < 1e-4, name
        else:
            assert relative_error(parameter.grad, exact) < 1e-4, name
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        assert relative_error(buffer, buffers[name]) < 1e-6, name


def test_activation_memory_of_training():
    x = torch.randn(2, 3, 224, 224)

    def peak(model):
        return peak_cpu_memory(lambda: model(x).sum())

    theirs = torchvision.models.efficientnet_b0().train()
    ours = models.efficientnet_b0().train()
    assert peak(ours) <= 0.45 * peak(theirs)


def test_a_phi_of_ones_own():
    scaling = Scaling.compound(1)
    assert (scaling.depth, scaling.width) == (1.2, 1.1)
    assert scaling.resolution == 258
    model = EfficientNet(Scaling.compound(-1), num_classes=10).eval()
    assert sum(p.numel() for p in model.parameters()) < PARAMETERS["efficientnet_b0"]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_feature_sizes():
    features = models.efficientnet_b0().eval().forward_features(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape[1:]) for f in features] == [
        (16, 32, 48), (24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 2, 3),
    ]  # fmt: skip
