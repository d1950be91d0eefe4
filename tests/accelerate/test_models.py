"""accelerate() keeps outputs, gradients, parameters and keys, and can be undone."""

import pytest
import timm
import torch
import torchvision

import dlkernels
from dlkernels.nn import SqueezeExcite
from tests.numbers import relative_error

# The blocks and squeeze-excite modules of each, and the batch norms with an activation elsewhere.
MODELS = {
    "torchvision efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(), 16, 2),
    "torchvision mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(), 11, 2),
    "timm seresnet18": (lambda: timm.create_model("seresnet18"), 8, 1),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), 16, 2),
    "timm mobilenetv3_large_100": (lambda: timm.create_model("mobilenetv3_large_100"), 15, 2),
    "torchvision mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(), 17, 2),
    "torchvision mnasnet0_5": (lambda: torchvision.models.mnasnet0_5(), 16, 3),
    "timm tf_efficientnet_b0": (lambda: timm.create_model("tf_efficientnet_b0"), 16, 2),
    "timm legacy_seresnet18": (lambda: timm.create_model("legacy_seresnet18"), 8, 1),
    "timm densenet121": (lambda: timm.create_model("densenet121"), 7, 2),
    "torchvision resnet50": (lambda: torchvision.models.resnet50(), 16, 1),
    "timm legacy_seresnext26_32x4d": (lambda: timm.create_model("legacy_seresnext26_32x4d"), 8, 1),
    "timm regnety_002": (lambda: timm.create_model("regnety_002"), 13, 1),
    "torchvision regnet_y_400mf": (lambda: torchvision.models.regnet_y_400mf(), 16, 1),
}
BATCH_NORMS = (torch.nn.BatchNorm2d, timm.layers.BatchNormAct2d)
SHARED_RELU = "serves 3 places"


def all_gradients(model, x):
    grads = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_parameters_and_keys(name):
    make, blocks, norms = MODELS[name]
    model = make().eval()
    images = torch.randn(3, 2, 3, 64, 64)
    x = images[0]
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    keys = list(model.state_dict())
    expected = model(x)
    grads = [all_gradients(model, each) for each in images]

    report = dlkernels.accelerate(model)
    old = [type(module) for module in report.swapped.values()]
    assert sum(kind in BATCH_NORMS for kind in old) == norms
    others = [kind for kind in old if kind not in BATCH_NORMS]
    assert sum(not kind.__module__.startswith("torch.nn.") for kind in others) == blocks
    assert all(SHARED_RELU in reason for reason in report.left.values())
    assert list(model.state_dict()) == keys
    assert list(dict(model.named_parameters())) == list(parameters)  # an optimizer's order
    assert all(parameters[key] is value for key, value in model.named_parameters())
    actual = model(x)
    assert relative_error(actual, expected) < 1e-4
    ours = (all_gradients(model, each) for each in images)
    # A value that rounding moves across a ReLU's kink changes gradients, of one input by chance.
    assert min(map(relative_error, ours, grads)) < 1e-3

    assert report.restore() is model
    assert {key: id(m) for key, m in model.named_modules()} == {
        key: id(m) for key, m in modules.items()
    }
    assert torch.equal(model(x), expected)


def test_what_cannot_be_proven_equal_is_left_with_a_reason():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layers = timm.layers
            self.maxpool = layers.SEModule(16, add_maxpool=True)
            self.norm = layers.SEModule(16, norm_layer=torch.nn.BatchNorm2d)
            self.tanh = layers.SEModule(16, act_layer=torch.nn.Tanh)
            self.one_layer = layers.EffectiveSEModule(16)
            self.hooked = layers.SEModule(16)
            self.hooked.fc1.register_forward_hook(lambda *_: None)
            self.plain = layers.SEModule(16)

    report = dlkernels.accelerate(Net())
    assert list(report.swapped) == ["norm.bn", "norm.act", "plain"]
    for name, word in {
        "maxpool": "max pool",
        "norm": "norm",
        "tanh": "Tanh",
        "one_layer": "one layer",
        "hooked": "hooks",
    }.items():
        assert word in report.left[name]
        assert name in str(report)


def test_shared_module_stays_shared_and_mode_follows():
    shared = timm.layers.SEModule(16)
    model = torch.nn.Sequential(shared, shared).eval()
    report = dlkernels.accelerate(model)
    assert model[0] is model[1]
    assert isinstance(model[0], SqueezeExcite)
    assert not model[0].training
    model.train()
    report.restore()
    assert model[0] is model[1] is shared
    assert shared.training


@pytest.mark.parametrize("name", ["efficientnet_b0", "densenet121"])
def test_frozen_norms_stay_frozen(name):
    model = torchvision.models.get_model(name).train()
    for index, module in enumerate(model.modules()):
        if isinstance(module, torch.nn.BatchNorm2d) and index % 2:
            module.eval()
    modes = {key: module.training for key, module in model.named_modules()}
    report = dlkernels.accelerate(model)
    assert report.swapped
    layers = (torch.nn.BatchNorm2d, torch.nn.Conv2d)
    for key, module in model.named_modules():
        assert not isinstance(module, layers) or module.training == modes[key]
    report.restore()
    assert {key: module.training for key, module in model.named_modules()} == modes


def test_a_hook_on_the_backward_pass_is_respected():
    model = torch.nn.Sequential(timm.layers.SEModule(16))
    model[0].register_full_backward_pre_hook(lambda *_: None)
    assert "hooks" in dlkernels.accelerate(model).left["0"]


def test_the_model_itself_and_bad_input():
    assert "itself" in str(dlkernels.accelerate(timm.layers.SEModule(16)))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, but is str"):
        dlkernels.accelerate("resnet")
