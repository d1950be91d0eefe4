"""ATSS against its plain formulas, and seen to learn."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torchvision.models import densenet121, resnet18
from torchvision.ops import box_iou

from dlkernels import models
from dlkernels.models.detection import ATSS, Backbone, PostProcessing
from dlkernels.models.detection.atss import (
    ASSIGNERS,
    CoarserLevels,
    Outputs,
    from_mmdetection,
)
from tests.models.detection.decoding import check_decoding_exports_and_compiles
from tests.models.detection.plain import PlainATSS, plain_detections, plain_losses
from tests.numbers import relative_error

SIZES = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]  # of the levels, for images of 128 x 160
IMAGE_SIZES = [(128, 160), (100, 131), (97, 160)]


class TinyBody(nn.Module):
    """Five strided convolutions; the last three maps are the backbone's."""

    def __init__(self, width=16):
        super().__init__()
        widths = [3, width, width, 2 * width, 2 * width, 2 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        )

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def tiny(classes=3, **options):
    options = {"channels": 32, "stacked_convs": 2, "min_size": 128, "max_size": 160, **options}
    return ATSS(classes, Backbone(TinyBody(), (32, 32, 32)), **options)


def random_outputs(classes, images, requires_grad=False):
    def maps(channels, scale):
        return [
            (scale * torch.randn(images, channels, *size)).requires_grad_(requires_grad)
            for size in SIZES
        ]

    return Outputs(maps(classes, 2), maps(4, 1), maps(1, 1))


def targets_of(*boxes_of_images):
    return [
        {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.arange(len(boxes)) % 3}
        for boxes in boxes_of_images
    ]


TARGETS = targets_of(
    [[10.0, 8, 70, 90], [60, 30, 150, 120], [20, 20, 33, 41], [12, 8, 72, 92]],
    [],
    [[-10, 20, 90, 96.5], [100, 3, 158, 61]],
)


# ---- the network --------------------------------------------------------------------------------


def test_mmdetection_checkpoint_gives_the_outputs_of_the_plain_network():
    plain = PlainATSS(classes=5, channels=32)
    for name, parameter in plain.named_parameters():
        if "scale" in name or "gn" in name or "bias" in name:
            nn.init.normal_(parameter, mean=0.5)
    model = ATSS(5, Backbone.of(resnet18(weights=None)), channels=32)
    checkpoint = {"meta": {"epoch": 12}, "state_dict": plain.state_dict()}
    model.load_state_dict(from_mmdetection(checkpoint), strict=True)

    plain.double().eval()
    model.double().eval()
    x = torch.randn(2, 3, 128, 160, dtype=torch.float64)
    with torch.no_grad():
        for name, actual, expected in zip(
            Outputs._fields, model.raw_outputs(x), plain(x), strict=True
        ):
            for level, (a, b) in enumerate(zip(actual, expected, strict=True)):
                assert relative_error(a, b) < 1e-12, f"{name}, level {level}"


def test_a_checkpoint_of_another_detector_is_refused():
    with pytest.raises(ValueError, match=r"ATSS, but has the key 'bbox_head.conv_cls.weight'"):
        from_mmdetection({"bbox_head.conv_cls.weight": torch.zeros(1)})


def small_densenet():
    return models.DenseNet(8, (2, 2, 2, 2), 16)


@pytest.mark.parametrize(
    "network", [resnet18, models.seresnet18, models.efficientnet_b0, small_densenet]
)
def test_backbones(network):
    network = network()
    model = ATSS(3, Backbone.of(network), channels=32)
    assert all(module.training for module in network.modules())
    outputs = model.raw_outputs(torch.randn(2, 3, 128, 160))
    for maps, channels in zip(outputs, (3, 4, 1), strict=True):
        assert [tuple(x.shape) for x in maps] == [(2, channels, *size) for size in SIZES]
    sum(x.sum() for maps in outputs for x in maps).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_densenets_maps_are_its_features():
    network = small_densenet().eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = network.forward_features(x)
        assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
        assert torch.equal(network.classifier(maps[-1].mean((2, 3))), network(x))


def test_default_is_resnet50_with_the_published_head():
    keys = ATSS().state_dict()
    assert keys["backbone.body.layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert keys["neck.inner_blocks.2.0.weight"].shape == (256, 2048, 1, 1)
    assert keys["head.class_branch.9.weight"].shape == (256, 256, 3, 3)
    assert keys["head.class_logits.weight"].shape == (80, 256, 3, 3)


def test_other_networks_are_refused():
    with pytest.raises(TypeError, match="DenseNet or EfficientNet, but is DenseNet; other"):
        Backbone.of(densenet121())
    model = ATSS(3, Backbone(nn.Sequential(nn.Conv2d(3, 8, 3)), (8, 8, 8)), channels=32)
    with pytest.raises(ValueError, match="at least three maps, but gives 1"):
        model.raw_outputs(torch.randn(1, 3, 64, 64))


def test_exported_and_compiled_predictions_are_the_same():
    check_decoding_exports_and_compiles(tiny().eval(), torch.rand(1, 3, 64, 96), "inductor")


# ---- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_losses_and_gradients_equal_the_plain_formulas(assigner):
    outputs = random_outputs(3, len(TARGETS), requires_grad=True)
    leaves = [x for maps in outputs for x in maps]
    actual = tiny(assigner=assigner).loss(outputs, TARGETS, IMAGE_SIZES)
    expected = plain_losses(outputs, TARGETS, IMAGE_SIZES, assigner)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value > 0.1, name
        assert actual[name].dtype == torch.float32
        assert relative_error(actual[name], value) < 1e-5, name
    gradients = torch.autograd.grad(sum(actual.values()), leaves)
    expected_gradients = torch.autograd.grad(sum(expected.values()), leaves)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert relative_error(a, b) < 1e-5


def test_assigners_differ():
    outputs = random_outputs(3, len(TARGETS))
    losses = [
        tiny(assigner=assigner).loss(outputs, TARGETS, IMAGE_SIZES)["loss_class"].item()
        for assigner in ASSIGNERS
    ]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_images_without_boxes_train(assigner):
    model = tiny(assigner=assigner)
    losses = model([torch.rand(3, 100, 120), torch.rand(3, 90, 60)], targets_of([], []))
    assert losses["loss_class"] > 0
    assert losses["loss_box"] == 0
    assert losses["loss_centerness"] == 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_every_parameter_gets_a_finite_gradient():
    model = tiny()
    images = [torch.rand(3, *size) for size in IMAGE_SIZES]
    losses = model(images, TARGETS)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if "scales" not in name:  # a level may have no positive anchors
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1), (3, 4)])
def test_coarser_levels_are_strided_convolutions(size, dtype):
    levels = CoarserLevels(64)
    x = torch.randn(2, 64, *size)
    expected = [x.double()]
    for conv in copy.deepcopy(levels).double().convs:
        expected.append(conv(expected[-1]))
    grads = [torch.randn_like(level) for level in expected[1:]]
    wanted = torch.autograd.grad(expected[1:], conv.weight, [g.double() for g in grads])
    levels.to(dtype)
    for _ in range(5):
        # Freed memory, where a gradient that is never written would be found.
        freed = [torch.full((values,), 1e30) for values in (1 << 12, 1 << 14, 1 << 16)]
        del freed
        actual = levels([x.to(dtype)], [], ["finest"])[0]
        found = torch.autograd.grad(
            actual[1:], levels.convs[1].weight, [g.to(dtype) for g in grads]
        )
        limit = 1e-12 if dtype == torch.float64 else 3e-2
        for a, b in zip((*actual[1:], *found), (*expected[1:], *wanted), strict=True):
            assert relative_error(a, b) < limit


def test_autocast():
    model = tiny()
    images = [torch.rand(3, *size) for size in IMAGE_SIZES]
    expected = model(images, TARGETS)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, TARGETS)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert relative_error(value, expected[name]) < 2e-2, name
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- detections ---------------------------------------------------------------------------------


def test_detections_equal_plain_loops():
    outputs = random_outputs(3, len(IMAGE_SIZES))
    post = PostProcessing(0.5, candidates_per_level=40, nms_iou=0.4, max_detections=30)
    actual = tiny(post_processing=post).get_bboxes(outputs, IMAGE_SIZES)
    expected = plain_detections(outputs, IMAGE_SIZES, 0.5, 40, 0.4, 30)
    for ours, theirs in zip(actual, expected, strict=True):
        assert 20 < len(theirs) <= 30
        assert ours["labels"].tolist() == [label for _, label, _ in theirs]
        torch.testing.assert_close(ours["scores"], torch.tensor([score for score, _, _ in theirs]))
        boxes = torch.tensor([box for _, _, box in theirs])
        torch.testing.assert_close(ours["boxes"], boxes, rtol=1e-5, atol=1e-3)


def test_evaluation_gives_what_torchvision_gives():
    model = tiny(post_processing=PostProcessing(score_threshold=0.001)).eval()
    sizes = [(100, 120), (300, 77), (64, 64)]
    images = [torch.rand(3, *size) for size in sizes]
    with torch.no_grad():
        detections = model(images)
    assert len(detections) == len(images)
    for (height, width), detection in zip(sizes, detections, strict=True):
        boxes, scores, labels = (detection[key] for key in ("boxes", "scores", "labels"))
        assert 0 < len(boxes) <= 100
        assert boxes.shape == (len(scores), 4)
        assert labels.shape == scores.shape
        assert labels.dtype == torch.int64
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height]) + 1e-3).all()
        assert (scores.diff() <= 0).all()


def test_a_batch_is_the_list_of_its_images():
    model = tiny(post_processing=PostProcessing(score_threshold=0.001)).eval()
    batch = torch.rand(2, 3, 90, 120)
    with torch.no_grad():
        for a, b in zip(model(batch), model(list(batch)), strict=True):
            assert len(a["boxes"]) > 0
            assert all(torch.equal(a[key], b[key]) for key in ("boxes", "scores", "labels"))


def test_training_without_targets_gives_raw_outputs():
    outputs = tiny()([torch.rand(3, 128, 160)])
    assert [tuple(x.shape[2:]) for x in outputs.class_logits] == SIZES


# ---- learning -----------------------------------------------------------------------------------


def rectangles(height, width, *boxes):
    """Coloured rectangles, whose colour is their label, on dim noise."""
    image = 0.3 * torch.rand(3, height, width)
    for label, (x1, y1, x2, y2) in enumerate(boxes):
        image[:, y1:y2, x1:x2] = torch.eye(3)[label][:, None, None]
    target = {"boxes": torch.tensor(boxes).float(), "labels": torch.arange(len(boxes))}
    return image, target


def test_it_learns_to_find_rectangles():
    images, targets = zip(
        rectangles(96, 96, (8, 10, 40, 50), (50, 40, 90, 88), (55, 6, 85, 30)),
        rectangles(96, 112, (60, 50, 108, 90), (5, 5, 45, 35)),
        rectangles(110, 96, (30, 60, 62, 100)),
        rectangles(100, 100, (4, 60, 40, 96), (56, 50, 84, 84), (30, 8, 80, 40)),
        strict=True,
    )
    model = tiny(channels=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(120):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] / 3

    model.eval()
    with torch.no_grad():
        detections = model(images)
    for target, found in zip(targets, detections, strict=True):
        confident = found["scores"] > 0.3
        boxes, labels = found["boxes"][confident], found["labels"][confident]
        same = labels[:, None] == target["labels"]
        overlaps = box_iou(boxes, target["boxes"]) * same
        assert (overlaps > 0.5).any(0).all(), "every rectangle is found, with its label"
        assert (overlaps > 0.5).any(1).all(), "nothing else is found"


# ---- bad input ----------------------------------------------------------------------------------


def bad(boxes=None, labels=None):
    target = {
        "boxes": torch.tensor([[1.0, 2, 30, 40]]) if boxes is None else boxes,
        "labels": torch.tensor([0]) if labels is None else labels,
    }
    return [torch.rand(3, 64, 96)], [target]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(labels=torch.tensor([3])), ValueError, r"between 0 and 2, but label 0 is 3"),
        (bad(labels=torch.tensor([-1])), ValueError, r"between 0 and 2, but label 0 is -1"),
        (bad(labels=torch.tensor([0, 1])), ValueError, r"must have shape \[1\], but has \[2\]"),
        (bad(labels=torch.tensor([0.0])), TypeError, "labels'] must be an int64 tensor"),
        (bad(boxes=torch.tensor([[1.0, 2, torch.nan, 4]])), ValueError, "box 0 is .*nan"),
        (bad(boxes=torch.tensor([[9.0, 2, 3, 4]])), ValueError, r"x1 < x2.*\[9.0, 2.0, 3.0, 4"),
        (bad(boxes=torch.tensor([[97.0, 2, 99, 4]])), ValueError, "overlap the image of 96 x 64"),
        (bad(boxes=torch.tensor([[1, 2, 3, 4]])), TypeError, "boxes'] must be a floating-point"),
        (bad(boxes=torch.zeros(1, 5)), ValueError, r"must have shape \[G, 4\]"),
        (([torch.rand(3, 64, 96)], []), ValueError, "one entry per image, 1, but has 0"),
        (([torch.rand(3, 64, 96)], [{}]), ValueError, "must have boxes and labels"),
        (([], []), ValueError, "at least one image"),
        (([torch.rand(1, 64, 96)], []), ValueError, r"images\[0\] must have shape \[3, H, W\]"),
        (([torch.zeros(3, 64, 96, dtype=torch.uint8)], []), TypeError, r"images\[0\] must be a f"),
    ],
)
def test_bad_images_and_targets(arguments, error, message):
    with pytest.raises(error, match=message):
        tiny()(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assigner": "nearest"}, "assigner must be one of 'atss', 'max_iou', 'fcos'"),
        ({"channels": 30}, "channels must be a positive multiple of 8, but is 30"),
        ({"anchor_scale": 0.0}, "anchor_scale must be above 0, but is 0.0"),
        ({"classes": 0}, "num_classes must be at least 1, but is 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)
