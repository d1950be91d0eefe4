"""nn.ResidualBlock takes the place, and the state dict, of other libraries' blocks."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dlkernels.nn
from dlkernels import use_backend
from dlkernels.nn import ResidualBlock
from tests.models.test_senet import randomized
from tests.numbers import FORMATS, relative_error
from tests.residual_block.cases import CHANNELS, PEERS, make_maps


def bottleneck(**options):
    return ResidualBlock(CHANNELS, 64, 16, 2, 4, squeeze_channels=8, **options)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("peer", PEERS)
def test_drop_in(peer, training, memory_format):
    theirs, mine = (randomized(make()).train(training) for make in PEERS[peer])
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.double()
    x1 = make_maps(memory_format)
    x2 = x1.detach().double().requires_grad_()
    out, expected = mine(x1), theirs(x2)
    weights = torch.randn(out.shape)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert out.is_contiguous(memory_format=memory_format)
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
@pytest.mark.parametrize("peer", PEERS)
def test_inference_without_gradients(peer, memory_format):
    block = randomized(PEERS[peer][1]()).eval()
    x = make_maps(memory_format)
    expected = block(x)
    with torch.no_grad():
        out = block(x)
    assert not out.requires_grad
    assert out.is_contiguous(memory_format=memory_format)
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("peer", PEERS)
def test_saved_for_backward(peer, training):
    """The input, the raw outputs of the convolutions, and the output for its ReLU."""
    block = PEERS[peer][1]().train(training)
    x = make_maps()
    saved = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t
    )
    with hooks:
        out = block(x)
    parameters = {tensor.data_ptr() for tensor in block.state_dict().values()}
    maps = [t for p, t in saved.items() if t.dim() == 4 and p not in parameters]
    # Each convolution has one raw output, and squeeze-and-excitation none of this size.
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.bias is None]
    assert len(maps) == len(convolutions) + 2
    assert {x.data_ptr(), out.data_ptr()} <= {t.data_ptr() for t in maps}


def test_running_statistics():
    """Of every kind of norm, as nn.BatchNorm2d keeps them; frozen ones stay."""
    theirs, mine = (make() for make in PEERS["torchvision Bottleneck of a ResNeXt"])
    mine.load_state_dict(theirs.state_dict())
    for block in (theirs, mine):
        block.bn1.momentum = None
        block.bn2.eval()
        block.bn3.running_mean = block.bn3.running_var = block.bn3.num_batches_tracked = None
        block.bn3.track_running_stats = False
    for _ in range(3):
        x = make_maps()
        assert relative_error(mine(x), theirs(x)) < 1e-5
    expected = dict(theirs.named_buffers())
    assert expected["bn1.num_batches_tracked"] == 3
    assert expected["bn2.num_batches_tracked"] == 0
    for name, buffer in mine.named_buffers():
        assert relative_error(buffer, expected[name]) < 1e-6, name
    x = make_maps()
    assert relative_error(mine.eval()(x), theirs.eval()(x)) < 1e-5


def test_running_statistics_may_change_before_backward():
    block = randomized(bottleneck()).eval()
    other, x = copy.deepcopy(block), make_maps()
    out = block(x)
    block.train()(make_maps())
    out.square().sum().backward()
    y = x.detach().requires_grad_()
    other(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_an_error_leaves_running_statistics_as_they_were():
    block = bottleneck()
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}

    def fail(*_):
        raise RuntimeError("out of memory")

    block.downsample[0].register_forward_pre_hook(fail)
    block.downsample[0].bias = nn.Parameter(torch.zeros(64))  # so that it is called
    with pytest.raises(RuntimeError, match="out of memory"):
        block(make_maps())
    assert all(torch.equal(buffer, before[name]) for name, buffer in block.named_buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", ["last", "before_last"])
def test_autocast(dtype, place):
    block = randomized(bottleneck(squeeze_place=place))
    x = make_maps()
    expected = copy.deepcopy(block)(x)
    with torch.autocast("cpu", dtype):
        out = block(x)
    out.float().sum().backward()
    assert out.dtype == dtype
    assert relative_error(out, expected) < 3e-2
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    block = randomized(bottleneck())
    x = make_maps()
    expected = copy.deepcopy(block)(x)
    out = block.to(dtype)(x.to(dtype))
    out.sum().backward()
    assert out.dtype == dtype
    limit = {torch.float64: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}[dtype]
    assert relative_error(out, expected) < limit
    assert all(p.grad.dtype == dtype for p in block.parameters())


@pytest.mark.parametrize("place", ["last", "before_last"])
def test_compile_without_graph_breaks(place):
    block = randomized(bottleneck(squeeze_place=place))
    other = copy.deepcopy(block)
    x = make_maps()
    expected = block(x)
    expected.square().sum().backward()
    y = x.detach().clone().requires_grad_()
    out = torch.compile(other, fullgraph=True)(y)
    out.square().sum().backward()
    assert relative_error(out, expected) < 1e-5
    assert relative_error(y.grad, x.grad) < 1e-4
    for a, b in zip(block.parameters(), other.parameters(), strict=True):
        assert relative_error(b.grad, a.grad) < 1e-3
    for a, b in zip(block.buffers(), other.buffers(), strict=True):
        assert relative_error(b, a) < 1e-6


def test_second_derivative_is_refused_and_the_reference_has_it():
    def second(block, x):
        (first,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()

    block = bottleneck()
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        second(block, make_maps())
    with use_backend("reference"):
        second(block, make_maps())
    assert block.conv1.weight.grad.abs().sum() > 0


def test_gradients_of_weights_alone_and_of_the_input_alone():
    block = randomized(bottleneck(squeeze_place="before_last"))
    whole, x = copy.deepcopy(block), make_maps()
    whole(x).square().sum().backward()
    of_weights = copy.deepcopy(block)
    of_weights(x.detach()).square().sum().backward()
    for a, b in zip(whole.parameters(), of_weights.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    of_input, y = copy.deepcopy(block).requires_grad_(False), x.detach().requires_grad_()
    of_input(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert all(parameter.grad is None for parameter in of_input.parameters())


def test_copies_and_pickles():
    block = randomized(bottleneck()).eval()
    x = make_maps()
    expected = block(x)
    assert torch.equal(copy.deepcopy(block)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(block))(x), expected)


@pytest.mark.parametrize("peer", PEERS)
def test_synchronized_norms_run_layer_by_layer(peer):
    block = randomized(PEERS[peer][1]())
    sync = dlkernels.nn.convert_sync_batchnorm(copy.deepcopy(block))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in sync.modules())
    x = make_maps()
    assert relative_error(sync(x), block(x)) < 1e-5
    for a, b in zip(sync.buffers(), block.buffers(), strict=True):
        assert relative_error(a, b) < 1e-6
    assert relative_error(sync.eval()(x), block.eval()(x)) < 1e-5


def test_bad_names():
    for options in (
        {"style": "keras"},
        {"activation": "tanh"},
        {"output_activation": "silu"},
        {"squeeze_activation": "tanh"},
        {"squeeze_place": "first"},
        {"gate": "tanh"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be one of"):
            bottleneck(**options)
