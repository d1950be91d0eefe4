"""DenseNet against torchvision and timm."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision

from dlkernels import accelerate, models
from dlkernels.nn import DenseBlock
from tests.numbers import relative_error


@pytest.mark.parametrize("depth", [121, 161, 169, 201])
def test_state_dicts_of_torchvision(depth):
    with torch.device("meta"):
        ours = getattr(models, f"densenet{depth}")()
        theirs = getattr(torchvision.models, f"densenet{depth}")()
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes


def test_same_logits_and_running_statistics_as_torchvision():
    theirs, ours = torchvision.models.densenet121(), models.densenet121()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(ours(x), theirs(x)) < 1e-4
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert relative_error(a, b) < 1e-4, name
    assert relative_error(ours.eval()(x), theirs.eval()(x)) < 1e-4


def test_weights_in_channels_last_give_the_same_numbers():
    contiguous = DenseBlock(2, 20, 4, 12)
    other = copy.deepcopy(contiguous).to(memory_format=torch.channels_last)
    assert not other.denselayer1.conv2.weight.is_contiguous()
    x = torch.randn(2, 20, 16, 16)
    outputs = [block(x) for block in (contiguous, other)]
    assert torch.equal(*outputs)
    for out in outputs:
        out.sum().backward()
    for a, b in zip(contiguous.parameters(), other.parameters(), strict=True):
        assert torch.equal(b.grad, a.grad)


def test_norms_of_all_processes_keep_their_relu():
    network = models.densenet121().eval()
    x = torch.randn(2, 3, 64, 64)
    before = network(x)
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert relative_error(converted(x), before) < 1e-5


def test_state_dict_of_timm():
    theirs, ours = timm.create_model("densenet121").eval(), models.densenet121().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(ours(x), theirs(x)) < 1e-5


def test_old_checkpoints():
    network = models.densenet121()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value
        for key, value in network.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    other = models.densenet121()
    other.load_state_dict(old, strict=True)
    name = "features.denseblock2.denselayer3.conv2.weight"
    assert torch.equal(other.get_parameter(name), network.get_parameter(name))


def test_parameters_of_the_paper():
    # Table 2: DenseNet-BC (L = 100, k = 12) has 0.8 M parameters, (L = 190, k = 40) 25.6 M.
    def millions(network):
        return round(sum(p.numel() for p in network.parameters()) / 1e6, 1)

    with torch.device("meta"):
        assert millions(models.densenet_cifar(100, 12)) == 0.8
        assert millions(models.densenet_cifar(190, 40)) == 25.6
        assert millions(models.densenet264()) == 33.3


def test_depth():
    with pytest.raises(ValueError, match=r"depth must be 4 plus .* but is 101"):
        models.densenet_cifar(101)


@pytest.mark.parametrize("memory", ["balanced", "minimal"])
def test_a_training_follows_torchvision(memory):
    torch.manual_seed(1)
    theirs = torchvision.models.DenseNet(8, (2, 2, 2), 16, num_classes=4)
    ours = models.DenseNet(8, (2, 2, 2), 16, num_classes=4, memory=memory)
    ours.load_state_dict(theirs.state_dict())
    images, labels = torch.randn(64, 3, 64, 64), torch.randint(0, 4, (64,))
    images += labels[:, None, None, None] * 0.3

    def losses(network):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.002)
        for step in range(100):
            batch = slice(step % 4 * 16, step % 4 * 16 + 16)
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    ours_curve, theirs_curve = list(losses(ours)), list(losses(theirs))
    assert theirs_curve[-1] < 0.8 * theirs_curve[0]
    for a, b in zip(ours_curve, theirs_curve, strict=True):
        assert abs(a - b) <= 1e-3 * b


@pytest.mark.parametrize(
    ("make", "memory"),
    [
        (lambda: torchvision.models.densenet121(), "balanced"),
        (lambda: torchvision.models.densenet121(memory_efficient=True), "minimal"),
        (lambda: timm.create_model("densenet121"), "balanced"),
    ],
)
def test_accelerate(make, memory):
    network = make().eval()
    x = torch.randn(1, 3, 64, 64)
    expected, keys = network(x), list(network.state_dict())
    report = accelerate(network)
    swapped = [name.removeprefix("features.") for name in report.swapped]
    blocks, transitions = (
        "denseblock1 denseblock2 denseblock3 denseblock4",
        "transition1 transition2",
    )
    assert {*blocks.split(), *transitions.split(), "transition3"} <= set(swapped)
    assert not report.left
    block = network.features.denseblock1
    assert isinstance(block, DenseBlock)
    assert block.memory == memory
    assert relative_error(network(x), expected) < 1e-5
    assert list(network.state_dict()) == keys
    report.restore()
    assert torch.equal(network(x), expected)


def test_accelerate_leaves_what_it_does_not_know():
    network = torchvision.models.densenet121()
    network.features.denseblock1.denselayer2.conv2 = torch.nn.Conv2d(128, 32, 3, padding=1)
    report = accelerate(network)
    assert "features.denseblock1" not in report.swapped
    assert "features.denseblock2" in report.swapped
    assert "denselayer2 has a convolution that is no plain 3x3" in str(report)
