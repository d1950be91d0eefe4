"""verify=True: what it compares, what it catches, and that it leaves no trace."""

from unittest import mock

import pytest
import timm
import torch
from torch import nn

import dlkernels
from dlkernels import model_bench
from dlkernels.accelerate import VerificationError, batch_norm_act, verify
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
    memory = [p.data_ptr() for p in model.parameters()]
    before = state_of(model)
    report = dlkernels.accelerate(model, x)
    after = state_of(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == memory
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    assert [m.training for m in (model, model[1], model[3])] == [training, False, training]
    assert len(report.swapped) == 3
    assert "verified" in str(report)
    names = {comparison.name for comparison in report.comparisons}
    assert {"evaluation: output 0", "training: gradients", "training: buffers"} <= names
    assert "training away from kinks: gradients" in names
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


def scale_gradient(model, name):
    return model.get_parameter(name).register_hook(lambda grad: 1.001 * grad)


def scale_statistics(model, name):
    norm = model.get_submodule(name)

    def hook(*_):
        if norm.training:
            norm.running_var.mul_(1.001)

    return model.register_forward_hook(hook)


def scale_output(model, name):
    return model.get_submodule(name).register_forward_hook(lambda _, __, out: 1.001 * out)


def scale_gradient_of_input(model, name):
    def hook(_, inputs):
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda grad: 1.001 * grad)

    return model.get_submodule(name).register_forward_pre_hook(hook)


WRONG = {
    "timm/mnasnet_050": [
        (scale_gradient, "conv_stem.weight"),
        (scale_gradient, "blocks.2.1.conv_dw.weight"),
        (scale_gradient, "blocks.5.2.bn2.weight"),
        (scale_gradient, "conv_head.weight"),
        (scale_statistics, "blocks.3.1.bn1"),
        (scale_statistics, "bn2"),
        (scale_output, "blocks.2.0"),
        (scale_gradient_of_input, "blocks.3.0"),
    ],
    "torchvision/regnet_y_400mf": [
        (scale_gradient, "trunk_output.block2.block2-0.f.b.1.weight"),
        (scale_gradient, "trunk_output.block3.block3-1.f.se.fc1.weight"),
        (scale_statistics, "trunk_output.block4.block4-2.f.a.1"),
        (scale_output, "trunk_output.block2.block2-0"),
        (scale_gradient_of_input, "trunk_output.block4.block4-0"),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_of_a_thousandth_in_whole_networks(name):
    """Networks with kinks, at which the gradients of the originals jump by much more."""
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = model_bench.settled(model_bench.make_model(name), x)
    verification = verify.Verification(model, x)
    assert dlkernels.accelerate(model).swapped
    verification.compare()
    for spoil, part in WRONG[name]:
        handle = spoil(model, part)
        with mock.patch.object(verify, "RUNS", 1):  # more only take longer
            comparisons = verification.compare(strict=False)
        handle.remove()
        smooth = [c.share for c in comparisons if "away from kinks" in c.name]
        assert max(smooth) > 1, (spoil.__name__, part)


@pytest.mark.parametrize("wrong_runs", [1, verify.RUNS - 1, verify.RUNS])
def test_a_chance_is_no_error_unless_it_happens_in_every_run(wrong_runs):
    model = small_model()
    x = torch.randn(2, 3, 8, 8)
    verification = verify.Verification(model, x)
    runs = []

    def spoil(module, inputs, out):
        runs.append(module)
        return 1.01 * out if len(runs) <= 3 * wrong_runs else out  # three modes

    model.register_forward_hook(spoil)
    if wrong_runs == verify.RUNS:
        with pytest.raises(VerificationError):
            verification.compare()
    else:
        verification.compare()
    assert len(runs) == 3 * min(wrong_runs + 1, verify.RUNS)


def test_a_result_that_is_no_number_is_an_error():
    model = small_model()
    verification = verify.Verification(model, torch.randn(2, 3, 8, 8))
    model.register_forward_hook(lambda _, __, out: out * float("nan"))
    with pytest.raises(VerificationError):
        verification.compare()
    model = small_model()
    model[0].weight.data[0] = float("nan")
    with pytest.raises(VerificationError):
        dlkernels.accelerate(model, torch.randn(2, 3, 8, 8))


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
