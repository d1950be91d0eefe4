"""Hooks, parametrizations, tied weights, wrappers and optimizers."""

import pytest
import timm
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import dlkernels
from dlkernels.nn import BatchNormAct2d, MBConv, SqueezeExcite


def pair():
    return nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())


def with_hook(register):
    def make():
        module = pair()
        getattr(module[0], register)(lambda *_: None)
        return module

    return make


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
]


@pytest.mark.parametrize("register", HOOKS)
def test_hooks(register):
    model = with_hook(register)()
    report = dlkernels.accelerate(model)
    assert "hooks" in report.left["0"]
    assert type(model[0]) is nn.BatchNorm2d


def test_a_hook_on_what_holds_the_pair_is_still_called():
    model, calls = nn.Sequential(pair()), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    assert dlkernels.accelerate(model).swapped
    model(torch.randn(2, 8, 4, 4))
    assert calls == [1]


def test_parametrizations_and_replaced_forwards():
    model = nn.Sequential(timm.layers.SEModule(16), timm.layers.SEModule(16), pair())
    nn.utils.parametrizations.weight_norm(model[0].fc1)
    model[1].forward = lambda x: x
    nn.utils.parametrize.register_parametrization(model[2][0], "weight", nn.Identity())
    report = dlkernels.accelerate(model)
    assert not report.swapped
    assert "parametrized" in report.left["0"]
    assert "replaced" in report.left["1"]
    assert "2.0" not in report.swapped


def test_tied_weights_stay_tied():
    model = nn.Sequential(timm.layers.SEModule(16), timm.layers.SEModule(16), pair(), pair())
    model[1].fc1.weight = model[0].fc1.weight
    model[3][0].weight = model[2][0].weight
    parameters = list(model.parameters())
    report = dlkernels.accelerate(model)
    assert len(report.swapped) == 6
    assert model[1].fc1.weight is model[0].fc1.weight
    assert model[3][0].weight is model[2][0].weight
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_an_activation_shared_by_sequences_is_swapped_in_each():
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(
        nn.Sequential(nn.BatchNorm2d(8), relu), nn.Sequential(nn.BatchNorm2d(8), relu), relu
    )
    report = dlkernels.accelerate(model)
    assert isinstance(model[1][0], BatchNormAct2d)
    assert model[2] is relu
    report.restore()
    assert model[0][1] is model[1][1] is relu


@pytest.mark.parametrize("first", [True, False], ids=["optimizer first", "accelerate first"])
def test_an_optimizer_made_before_or_after_trains_the_same(first):
    def trained(accelerated):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.SiLU())
        model.append(timm.layers.SEModule(16)).double()
        if accelerated and not first:
            dlkernels.accelerate(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if accelerated and first:
            dlkernels.accelerate(model)
        for _ in range(3):
            model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    (expected, reference), (actual, optimizer) = trained(False), trained(True)
    for name, value in expected.state_dict().items():
        assert torch.allclose(value, actual.state_dict()[name], rtol=1e-9), name
    optimizer.load_state_dict(reference.state_dict())


def test_compiled_and_scripted_models_are_left():
    for model in (torch.compile(pair()), torch.jit.script(pair())):
        report = dlkernels.accelerate(nn.ModuleDict({"it": model}))
        assert "accelerate it first" in report.left["it"]
        assert "accelerate it first" in str(dlkernels.accelerate(model, torch.randn(2, 8, 4, 4)))
    in_place = nn.Sequential(pair(), pair())
    in_place[0].compile()
    report = dlkernels.accelerate(in_place)
    assert list(report.left) == ["0"]
    assert list(report.swapped) == ["1.0", "1.1"]


@pytest.fixture
def process_group(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_is_swapped_inside(process_group):
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 8, 3), *pair()))
    x = torch.randn(2, 3, 6, 6)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    report = dlkernels.accelerate(model, x)
    assert list(report.swapped) == ["module.1", "module.2"]
    assert report.comparisons
    model(x).sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, grad, atol=1e-5)
    assert report.restore() is model


def test_sharded_models_are_left(process_group):
    model = nn.Sequential(pair(), pair())
    fully_shard(model[0], mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    assert isinstance(model[0], FSDPModule)
    report = dlkernels.accelerate(model)
    assert "FSDP" in report.left["0"]
    assert list(report.swapped) == ["1.0", "1.1"]


def test_mixed_modes_stay_and_act():
    model = timm.create_model("efficientnet_lite0", drop_path_rate=0.2).train()
    block = model.blocks[1][1]
    block.eval()
    block.bn1.train()
    report = dlkernels.accelerate(model)
    fused = model.blocks[1][1]
    assert isinstance(fused, MBConv)
    assert not fused.training
    assert fused.bn1.training
    assert not fused.bn2.training
    report.restore()
    block.drop_path.train()
    report = dlkernels.accelerate(model)
    assert "another mode" in report.left["blocks.1.1"]


def test_accelerate_twice_changes_nothing_more():
    model = nn.Sequential(pair(), timm.layers.SEModule(8))
    dlkernels.accelerate(model)
    modules = list(model.modules())
    report = dlkernels.accelerate(model)
    assert not report.swapped
    assert not report.left
    assert list(model.modules()) == modules
    assert isinstance(model[1], SqueezeExcite)


def test_dropout_in_a_block_is_left():
    model = timm.create_model("efficientnet_lite0")
    model.blocks[1][1].drop_path = nn.Dropout(0.5)
    assert "drops single values" in dlkernels.accelerate(model).left["blocks.1.1"]
