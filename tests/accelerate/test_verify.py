"""verify=True: what it compares, what it catches, and that it leaves no trace."""

from unittest import mock

import pytest
import timm
import torch
from torch import nn

import dlkernels
from dlkernels.accelerate import VerificationError, batch_norm_act
from dlkernels.nn import BatchNormAct2d, SqueezeExcite


def small_model():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        timm.layers.SEModule(16),
        nn.Dropout(0.5),
    )


def state_of(model):
    return {
        "rng": torch.get_rng_state(),
        **{f"grad of {name}": p.grad.clone() for name, p in model.named_parameters()},
        **{name: value.clone() for name, value in model.state_dict().items()},
    }


@pytest.mark.parametrize("training", [False, True])
def test_a_verified_model_has_its_state_and_modes(training):
    model = small_model().train(training)
    model[1].eval()
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    grads = [p.grad for p in model.parameters()]
    buffers = dict(model.named_buffers())
    before = state_of(model)
    report = dlkernels.accelerate(model, x)
    after = state_of(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    assert [m.training for m in (model, model[1], model[3])] == [training, False, training]
    assert len(report.swapped) == 3
    assert "verified" in str(report)
    names = {comparison.name for comparison in report.comparisons}
    assert {"evaluation: output 0", "training: gradients", "training: buffers"} <= names
    assert "training: gradients of 3.fc1.weight" in names


@pytest.mark.parametrize("part", ["value", "gradient", "buffer"])
def test_a_wrong_swap_is_undone(part):
    class Wrong(BatchNormAct2d):
        def forward(self, input):
            if part == "buffer" and self.training:
                self.running_mean.add_(0.1)
            if part == "gradient":
                input.register_hook(lambda grad: grad * 1.01)
            return super().forward(input) * (1.01 if part == "value" else 1)

    model = small_model()
    modules = list(model.modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with (
        mock.patch.object(batch_norm_act, "BatchNormAct2d", Wrong),
        pytest.raises(VerificationError, match=r"model was restored.*relative error"),
    ):
        dlkernels.accelerate(model, torch.randn(2, 3, 8, 8))
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_swap_that_does_not_run_is_undone():
    model = nn.Sequential(timm.layers.SEModule(16))
    original = model[0]
    with (
        mock.patch.object(SqueezeExcite, "forward", side_effect=ValueError("broken")),
        pytest.raises(VerificationError, match="does not run: broken"),
    ):
        dlkernels.accelerate(model, torch.randn(2, 16, 8, 8))
    assert model[0] is original


def test_without_verify_nothing_is_run():
    model = small_model()
    with mock.patch.object(nn.Conv2d, "forward", side_effect=AssertionError):
        assert not dlkernels.accelerate(model, torch.randn(2, 3, 8, 8), verify=False).comparisons
        assert not dlkernels.accelerate(small_model()).comparisons


def test_forms_of_the_example():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small_model()

        def forward(self, x, *, y):
            return {"sum": self.model(x) + y, "name": "pair"}

    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 16, 8, 8)
    assert dlkernels.accelerate(Pair(), {"x": x, "y": y}).comparisons
    assert dlkernels.accelerate(small_model(), (x,)).comparisons
    assert dlkernels.accelerate(small_model().bfloat16(), x.bfloat16()).comparisons
    with pytest.raises(RuntimeError, match=r"does not run on example_input.*verify=False"):
        dlkernels.accelerate(Pair(), x)


def test_frozen_parameters_have_no_gradients_to_compare():
    model = small_model().requires_grad_(False)
    report = dlkernels.accelerate(model, torch.randn(2, 3, 8, 8))
    assert not any("gradient" in comparison.name for comparison in report.comparisons)
    model = small_model()
    model[1].requires_grad_(False)
    dlkernels.accelerate(model, torch.randn(2, 3, 8, 8))
    assert [p.requires_grad for p in model[1].parameters()] == [False, False]
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model[1].weight.grad is None
    assert model[0].weight.grad is not None
