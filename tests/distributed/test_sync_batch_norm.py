"""SyncBatchNorm in fused modules: two processes do what one does with the joined batch."""

import copy

import pytest
import torch
from torch import nn

import dlkernels
from dlkernels.nn import DenseBlock, DepthwiseConvBNAct, MBConv, Transition
from tests.distributed.two import in_two_processes
from tests.numbers import assert_exact

CHANNELS = 8
MODULES = {
    "MBConv": lambda: MBConv(CHANNELS, CHANNELS, 16, squeeze_channels=4),
    "DepthwiseConvBNAct": lambda: DepthwiseConvBNAct(CHANNELS, 3, 2),
    "DenseBlock": lambda: DenseBlock(2, CHANNELS, 2, 4),
    "Transition": lambda: Transition(CHANNELS, 4),
    "BatchNormAct2d": lambda: nn.Sequential(
        dlkernels.nn.BatchNormAct2d(CHANNELS, activation="mish")
    ),
    "no momentum": lambda: DepthwiseConvBNAct(CHANNELS, 3, momentum=None),
}


def step(module, x, weight):
    x = x.clone().requires_grad_()
    (module(x) * weight).sum().backward()
    return {
        "x": x.grad,
        **{name: parameter.grad for name, parameter in module.named_parameters()},
        **{name: buffer.clone() for name, buffer in module.named_buffers()},
    }


def of_one_process(rank, module, batches, weights):
    return step(module, batches[rank], weights[rank])


@pytest.mark.parametrize("name", MODULES)
def test_two_processes_are_one_with_the_joined_batch(name):
    sizes = (1, 4)  # of their batches
    module = MODULES[name]()
    x = torch.randn(sum(sizes), CHANNELS, 6, 6) + 3
    weight = torch.randn_like(module(x).detach())
    module = MODULES[name]()
    converted = dlkernels.nn.convert_sync_batchnorm(copy.deepcopy(module))
    assert any(isinstance(child, nn.SyncBatchNorm) for child in converted.modules())
    expected = step(copy.deepcopy(module).double(), x.double(), weight.double())
    ours = in_two_processes(of_one_process, converted, x.split(sizes), weight.split(sizes))
    for key, wanted in expected.items():
        if key == "x":
            actual = torch.cat([result[key] for result in ours])
        elif wanted.is_floating_point() and "running" not in key:
            actual = ours[0][key] + ours[1][key]
        else:
            assert torch.equal(ours[0][key], ours[1][key])
            actual = ours[0][key]
        assert_exact(key, actual.float(), wanted, 36 * sum(sizes) * 9)


def test_one_process_and_evaluation():
    module = MODULES["MBConv"]()
    converted = dlkernels.nn.convert_sync_batchnorm(copy.deepcopy(module))
    x = torch.randn(3, CHANNELS, 6, 6)
    for mode in (True, False):
        expected, actual = module.train(mode)(x), converted.train(mode)(x)
        assert_exact("out", actual, expected, 64)
    for key, value in module.state_dict().items():
        assert_exact(key, converted.state_dict()[key].float(), value, 64)
