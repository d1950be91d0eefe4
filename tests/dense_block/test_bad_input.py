"""Bad arguments get a TypeError or ValueError that names the argument, its value and the need."""

import pytest
import torch

from dlkernels import nn, ops
from tests.dense_block.cases import SMALL, make_layers, make_maps


@pytest.mark.parametrize(
    ("place", "field", "value", "error", "message"),
    [
        ((0, 0), "weight", torch.randn(8, 7, 1, 1), ValueError, r"\[0\]\[0\].*\[8, 6, 1, 1\].*7"),
        ((1, 0), "weight", torch.randn(8, 6, 1, 1), ValueError, r"\[1\]\[0\].*\[8, 10, 1, 1\]"),
        ((0, 1), "weight", torch.randn(4, 8, 1, 1), ValueError, r"\[0\]\[1\].*\[4, 8, 3, 3\]"),
        ((1, 1), "weight", torch.randn(5, 8, 3, 3), ValueError, r"layers\[1\]\[1\]\.weight"),
        ((0, 0), "weight", torch.randn(8, 6, 1, 1).half(), TypeError, "float16"),
        ((0, 0), "weight", None, TypeError, "must be a tensor, but is NoneType"),
        ((0, 1), "norm_weight", torch.randn(7), ValueError, r"norm_weight .*\[8\].*\[7\]"),
        ((0, 1), "norm_bias", torch.arange(8), TypeError, "norm_bias.*int64"),
        ((1, 1), "running_var", torch.rand(9), ValueError, r"running_var .*\[8\].*\[9\]"),
        ((1, 1), "running_mean", torch.rand(8, device="meta"), ValueError, "running_mean.*meta"),
    ],
)
def test_layers(place, field, value, error, message):
    layers = make_layers(SMALL)
    layer, stage = place
    layers[layer][stage] = layers[layer][stage]._replace(**{field: value})
    with pytest.raises(error, match=message):
        ops.dense_block(make_maps(SMALL), layers, training=True)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ("maps", TypeError, "x must be a tensor, but is str"),
        (torch.randn(6, 4, 4), ValueError, r"x must have shape \[N, C, H, W\].*\[6, 4, 4\]"),
        (torch.ones(2, 6, 4, 4, dtype=torch.int32), TypeError, "x must be float32.*int32"),
        (torch.randn(2, 5, 4, 4), ValueError, r"layers\[0\]\[0\].weight must have shape"),
        (torch.randn(1, 6, 1, 1), ValueError, "more than one value per channel"),
    ],
)
def test_maps(x, error, message):
    with pytest.raises(error, match=message):
        ops.dense_block(x, make_layers(SMALL), training=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "huge"}, "memory must be one of 'balanced', 'minimal', but is 'huge'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), but is 1.0"),
        ({"dropout": -0.5}, "dropout must be in"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        ops.dense_block(make_maps(SMALL), make_layers(SMALL), training=True, **options)


@pytest.mark.parametrize("layers", [[], [[]]])
def test_no_layers(layers):
    with pytest.raises(ValueError, match="layers must hold at least one layer"):
        ops.dense_block(make_maps(SMALL), layers, training=True)


def test_layers_of_two_kinds():
    layers = make_layers(SMALL)
    with pytest.raises(ValueError, match=r"layers\[1\] must have 2 convolutions as layers\[0\]"):
        ops.dense_block(make_maps(SMALL), [layers[0], layers[1][1:]], training=True)


def test_no_running_statistics_in_evaluation():
    layers = make_layers(SMALL)
    layers[0][0] = layers[0][0]._replace(running_mean=None)
    with pytest.raises(ValueError, match="running_mean must be given outside training"):
        ops.dense_block(make_maps(SMALL), layers, training=False)


def test_transition_of_too_small_maps():
    with pytest.raises(ValueError, match=r"x must be at least 2x2, but has shape \[4, 6, 1, 3\]"):
        ops.transition(torch.randn(4, 6, 1, 3), make_layers(SMALL)[0][0], training=True)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (None, TypeError, "layer.weight must be a tensor, but is NoneType"),
        (torch.randn(8), ValueError, r"layer.weight must have shape \[out, in, 1, 1\].*\[8\]"),
        (torch.randn(8, 7, 1, 1), ValueError, r"layer.weight .*\[8, 6, 1, 1\].*7"),
    ],
)
def test_transition_of_other_weights(weight, error, message):
    stage = make_layers(SMALL)[0][0]._replace(weight=weight)
    with pytest.raises(error, match=message):
        ops.transition(make_maps(SMALL), stage, training=True)


def test_modules():
    with pytest.raises(ValueError, match="memory must be one of"):
        nn.DenseBlock(2, 6, 4, 4, memory="none")


def test_the_bare_op_touches_no_memory_of_wrong_shape():
    x, layers = make_maps(SMALL), make_layers(SMALL)
    stages = [stage for layer in layers for stage in layer]
    norms = [[s.norm_weight for s in stages], [s.norm_bias for s in stages]]
    weights = [stage.weight for stage in stages]
    op = torch.ops.dlkernels.dense_block
    with pytest.raises(RuntimeError, match="do not add up"):
        op(x, weights[:2] + weights[:2], *norms, [], [], None, 0.0, 1e-5, True)
    with pytest.raises(RuntimeError, match="every convolution must have a norm"):
        op(x, weights, norms[0][:3], norms[1], [], [], None, 0.0, 1e-5, True)
    kept = torch.ones(1, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="kept must be"):
        op(x, weights, *norms, [], [], kept, 0.5, 1e-5, True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"training": None}, TypeError, "training must be True or False, but is None"),
        ({"momentum": None}, TypeError, "momentum must be a number, but is NoneType"),
        ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], but is 1.5"),
        ({"eps": 0.0}, ValueError, "eps must be finite and above 0"),
        ({"dropout": "much"}, TypeError, "dropout must be a number, but is str"),
        ({"layers": None}, TypeError, "layers must be a list or tuple of layers.*NoneType"),
        ({"layers": [None]}, TypeError, r"layers\[0\] must be a list or tuple"),
        ({"layers": [[None]]}, TypeError, r"layers\[0\]\[0\] must be a NormConv.*NoneType"),
    ],
)
def test_other_options(options, error, message):
    arguments = {"layers": make_layers(SMALL), "training": True, **options}
    with pytest.raises(error, match=message):
        ops.dense_block(make_maps(SMALL), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mean: mean[:1].expand_as(mean), "running_mean must not be expanded"),
        (lambda mean: mean.clone().requires_grad_(), "running_mean gets no gradient"),
    ],
)
def test_running_statistics_that_cannot_be_updated(change, message):
    stage = make_layers(SMALL)[0][0]
    stage = stage._replace(running_mean=change(stage.running_mean))
    with pytest.raises(ValueError, match=message):
        ops.transition(make_maps(SMALL), stage, training=True)


def test_slices():
    maps = make_maps(SMALL)
    with pytest.raises(TypeError, match="first must be an integer, but is float"):
        ops.channel_statistics(maps, 0.5)
    with pytest.raises(TypeError, match="count must be an integer, but is str"):
        ops.channel_statistics(maps, 0, "all")
    with pytest.raises(ValueError, match="first and count: the slice must lie within the 6"):
        ops.channel_statistics(maps, 2, 2**70)
