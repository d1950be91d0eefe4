"""nn.BatchNormAct2d takes the place of nn.BatchNorm2d: keys, running statistics, export."""

import copy

import pytest
import timm
import torch
from torch import nn

import dlkernels.nn
from tests.numbers import FORMATS, assert_exact, relative_error

OPTIONS = {
    "default": {},
    "cumulative average": {"momentum": None},
    "other momentum": {"momentum": 0.3, "eps": 1e-3},
    "no running statistics": {"track_running_stats": False},
    "no affine": {"affine": False},
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_as_batch_norm(options, memory_format):
    theirs = nn.Sequential(nn.BatchNorm2d(24, **options), nn.SiLU()).double()
    ours = dlkernels.nn.BatchNormAct2d(24, **options, activation="silu")
    for step in range(4):
        if step == 3:
            theirs.eval()
            ours.eval()
        x = (torch.randn(4, 24, 6, 5) + 3).contiguous(memory_format=memory_format)
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        out, expected = ours(a), theirs(b)
        out.square().sum().backward()
        expected.square().sum().backward()
        assert_exact("out", out, expected, 120)
        assert_exact("gradient of x", a.grad, b.grad, 120)
        state = ours.state_dict()
        assert list(state) == list(theirs[0].state_dict())
        for key, value in theirs[0].state_dict().items():
            assert relative_error(state[key], value) < 1e-6, key
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_exact("gradient of a parameter", p.grad, q.grad, 120)


def test_state_dict_loads_both_ways():
    theirs = nn.BatchNorm2d(8)
    theirs(torch.randn(4, 8, 3, 3))
    ours = dlkernels.nn.BatchNormAct2d(8, activation="relu")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    nn.BatchNorm2d(8).load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 8, 3, 3)
    assert relative_error(ours.eval()(x), torch.relu(theirs.eval()(x))) < 1e-6


def test_residual_sample_scale_and_pool():
    module = dlkernels.nn.BatchNormAct2d(8, activation="mish").eval()
    x, residual = torch.randn(2, 2, 8, 3, 3)
    keep = torch.tensor([0.0, 2.0])
    plain = nn.functional.mish(nn.BatchNorm2d(8).eval()(x))
    expected = plain * keep[:, None, None, None] + residual
    assert relative_error(module(x, residual, keep), expected) < 1e-6
    out, pooled = module.pooled(x)
    assert relative_error(out, plain) < 1e-6
    assert relative_error(pooled, plain.mean((2, 3))) < 1e-6


def test_half_precision_maps_and_float32_parameters():
    module = dlkernels.nn.BatchNormAct2d(8, activation="silu")
    x = torch.randn(2, 8, 3, 3, dtype=torch.bfloat16)
    out = module(x)
    assert out.dtype == torch.bfloat16
    assert module.running_mean.dtype == torch.float32
    plain = nn.functional.silu(nn.BatchNorm2d(8)(x.float()))
    assert relative_error(out, plain) < 8e-3
    module.half()
    assert module(x.half()).dtype == module.running_var.dtype == torch.float16


def test_compile_in_training_updates_the_statistics():
    eager = dlkernels.nn.BatchNormAct2d(8, activation="silu")
    module = dlkernels.nn.BatchNormAct2d(8, activation="silu")
    x = torch.randn(2, 8, 3, 3)
    out = torch.compile(module, fullgraph=True)(x)
    assert relative_error(out, eager(x)) < 1e-6
    assert relative_error(module.running_var, eager.running_var) < 1e-6
    assert module.num_batches_tracked == 1


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    module = dlkernels.nn.BatchNormAct2d(8, activation="silu")
    module(torch.randn(4, 8, 3, 3))
    module.eval()
    x = torch.randn(2, 8, 3, 3)
    path = tmp_path / "norm.onnx"
    torch.onnx.export(module, (x,), path, input_names=["x"], verbose=False)
    (out,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    assert relative_error(torch.from_numpy(out), module(x).detach()) < 1e-6


@pytest.mark.parametrize(
    "convert",
    [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm],
    ids=["torch", "timm"],
)
def test_conversions_that_drop_the_activation_are_refused(convert):
    model = nn.Sequential(
        nn.BatchNorm2d(8),
        dlkernels.nn.BatchNormAct2d(8, activation="silu"),
    ).eval()
    x = torch.randn(2, 8, 3, 3)
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"drop the activation silu.*dlkernels.nn.convert"):
        convert(model)
    converted = dlkernels.nn.convert_sync_batchnorm(model)
    assert all(isinstance(child, nn.SyncBatchNorm) for child in converted)
    assert relative_error(converted(x), expected) < 1e-6
    convert(nn.Sequential(dlkernels.nn.BatchNormAct2d(8)))  # there is none to drop


def test_what_quantization_sets():
    module = dlkernels.nn.BatchNormAct2d(8, activation="relu")
    assert not hasattr(module, "qconfig")
    module.qconfig = "some"
    assert copy.deepcopy(module).qconfig == "some"
