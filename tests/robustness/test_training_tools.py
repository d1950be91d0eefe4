"""Fused modules under activation checkpointing, DistributedDataParallel and FSDP2."""

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.distributed.two import in_two_processes
from tests.numbers import relative_error
from tests.robustness.calls import CHANNELS, MODULES, equal, make_module


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_activation_checkpointing(name, use_reentrant):
    x = torch.randn(2, CHANNELS, 12, 12)

    def gradients(forward):
        module = make_module(name)
        leaf = x.clone().requires_grad_()
        forward(module, leaf).square().sum().backward()
        return [leaf.grad, *(parameter.grad for parameter in module.parameters())]

    plain = gradients(lambda module, leaf: module(leaf))
    again = gradients(lambda module, leaf: checkpoint(module, leaf, use_reentrant=use_reentrant))
    assert equal(again, plain)


def gradients_of(module, x):
    module(x).square().sum().backward()
    return [parameter.grad for parameter in module.parameters()]


def under_ddp(rank, module, batches):
    # Buckets so small that every parameter has its own.
    wrapped = DistributedDataParallel(module, bucket_cap_mb=1e-4, gradient_as_bucket_view=True)
    return [gradient.clone() for gradient in gradients_of(wrapped, batches[rank])]


def under_fsdp(rank, module, batches):
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    return [gradient.full_tensor() for gradient in gradients_of(module, batches[rank])]


@pytest.mark.parametrize("wrapper", [under_ddp, under_fsdp])
@pytest.mark.parametrize("name", MODULES)
def test_two_processes_average_their_gradients(name, wrapper):
    """Each process normalises its own batch, as in PyTorch without SyncBatchNorm."""
    module = make_module(name)
    batches = list(torch.randn(2, 3, CHANNELS, 12, 12))
    separate = [gradients_of(copy.deepcopy(module), batch) for batch in batches]
    expected = [sum(pair) / 2 for pair in zip(*separate, strict=True)]
    for result in in_two_processes(wrapper, module, batches):
        for actual, wanted in zip(result, expected, strict=True):
            assert relative_error(actual, wanted) < 1e-5
