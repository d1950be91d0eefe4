"""YOLOv4 and YOLOv3-ASFF against their plain formulas, and seen to learn."""

import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from dlkernels.models.detection import PostProcessing, YOLOv3ASFF, YOLOv4, conv_block
from dlkernels.models.detection.conv_block import Maps, convolved
from tests.models.detection.decoding import check_decoding_exports_and_compiles
from tests.models.detection.plain_yolo import PlainYOLOv3ASFF, PlainYOLOv4, plain_losses
from tests.models.detection.test_atss import TARGETS, rectangles, targets_of
from tests.numbers import relative_error

DETECTORS = (YOLOv4, YOLOv3ASFF)
PLAIN = {YOLOv4: PlainYOLOv4, YOLOv3ASFF: PlainYOLOv3ASFF}
WIDTHS = (8, 8, 16, 32, 64, 128)  # of the six stages at width 1/8
IMAGE_SIZES = [(128, 160), (100, 131), (97, 160)]
ANCHORS = (
    ((20, 20), (30, 24), (30, 40)),
    ((40, 30), (40, 40), (40, 50)),
    ((50, 40), (60, 60), (80, 80)),
)


def tiny(detector, classes=3, **options):
    options = {"width": 0.125, "depth": 0.25, "min_size": 128, "max_size": 160, **options}
    return detector(classes, anchors=ANCHORS, **options)


def tiny_and_plain(detector):
    """Both networks with the same random parameters, in float64."""
    model = tiny(detector)
    plain = PLAIN[detector](WIDTHS, (1, 1, 2, 2, 1), model.values_per_cell)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.5)
    entries = model.state_dict().values()
    plain.load_state_dict(dict(zip(plain.state_dict(), entries, strict=True)))
    return model.double(), plain.double()


def random_outputs(images, requires_grad=False):
    sizes = ((16, 20), (8, 10), (4, 5))
    return [torch.randn(images, 24, *size).requires_grad_(requires_grad) for size in sizes]


# ---- the networks -------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_equal_the_plain_network(detector, training):
    model, plain = (net.train(training) for net in tiny_and_plain(detector))
    x = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    outputs, expected = model.raw_outputs(x), plain(x)
    weights = [torch.randn_like(maps) for maps in expected]
    gradients = []
    for maps, net in ((outputs, model), (expected, plain)):
        total = sum((a * b).sum() for a, b in zip(maps, weights, strict=True))
        gradients.append(torch.autograd.grad(total, list(net.parameters())))
    for a, b in zip(outputs, expected, strict=True):
        assert relative_error(a, b) < 1e-11
    for (name, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
        assert relative_error(a, b) < 1e-9, name
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("detector", "parameters"), [(YOLOv4, 64363101), (YOLOv3ASFF, 65475766)])
def test_published_size(detector, parameters):
    with torch.device("meta"):
        model = detector()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("detector", DETECTORS)
def test_state_dict_round_trip(detector):
    model, other = (tiny(detector).eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 64, 64)
    for a, b in zip(model.raw_outputs(x), other.raw_outputs(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("detector", DETECTORS)
def test_exported_and_compiled_predictions_are_the_same(detector):
    # Inductor compiles some hundred kernels of these networks, for minutes.
    model = tiny(detector).eval()
    check_decoding_exports_and_compiles(model, torch.rand(1, 3, 64, 96), "aot_eager")


def test_compiled_training_gives_the_same_gradients():
    model = tiny(YOLOv4)
    x = torch.rand(2, 3, 64, 64)

    def gradients(function):
        total = sum(maps.square().sum() for maps in function(x))
        return torch.autograd.grad(total, list(model.parameters()))

    compiled = torch.compile(model.raw_outputs, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled), gradients(model.raw_outputs), strict=True):
        assert relative_error(a, b) < 1e-3


# ---- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", DETECTORS)
def test_losses_and_gradients_equal_plain_loops(detector):
    model = tiny(detector)
    outputs = random_outputs(len(TARGETS), requires_grad=True)
    actual = model.loss(outputs, TARGETS, IMAGE_SIZES)
    expected, positives = plain_losses(model, outputs, TARGETS, IMAGE_SIZES)
    assert positives > (6 if detector is YOLOv4 else 3)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value > 0.1, name
        assert relative_error(actual[name], value) < 1e-5, name
    gradients = torch.autograd.grad(sum(actual.values()), outputs)
    for a, b in zip(gradients, torch.autograd.grad(sum(expected.values()), outputs), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("detector", DETECTORS)
def test_images_without_boxes_train(detector):
    model = tiny(detector)
    losses = model([torch.rand(3, 100, 120), torch.rand(3, 90, 60)], targets_of([], []))
    assert losses["loss_confidence"] > 0
    assert losses["loss_box"] == losses["loss_class"] == 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("detector", DETECTORS)
def test_autocast(detector):
    model = tiny(detector)
    images = [torch.rand(3, *size) for size in IMAGE_SIZES]
    expected = model(images, TARGETS)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, TARGETS)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert relative_error(value, expected[name]) < 5e-2, name
    sum(losses.values()).backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


# ---- detections ---------------------------------------------------------------------------------


def test_detections_are_the_confident_predictions():
    post = PostProcessing(0.5, nms_iou=0.4, max_detections=30)
    model = tiny(YOLOv4, post_processing=post)
    outputs = random_outputs(len(IMAGE_SIZES))
    boxes, confidence, probabilities = model.decode(outputs)
    for image, found in enumerate(model.get_bboxes(outputs, IMAGE_SIZES)):
        assert 10 < len(found["boxes"]) <= 30
        height, width = IMAGE_SIZES[image]
        clipped = boxes[image].clone()
        clipped[:, 0::2].clamp_(0, width)
        clipped[:, 1::2].clamp_(0, height)
        for box, score, label in zip(
            *(found[k] for k in ("boxes", "scores", "labels")), strict=True
        ):
            at = (clipped == box).all(1)  # several, where boxes fill the image
            expected = confidence[image, at] * probabilities[image, at, label]
            assert score > 0.5
            assert torch.isclose(expected, score).any()


@pytest.mark.parametrize("detector", DETECTORS)
def test_evaluation_gives_what_torchvision_gives(detector):
    model = tiny(detector, post_processing=PostProcessing(score_threshold=0.001)).eval()
    sizes = [(100, 120), (300, 77), (64, 64)]
    with torch.no_grad():
        detections = model([torch.rand(3, *size) for size in sizes])
    for (height, width), found in zip(sizes, detections, strict=True):
        assert 0 < len(found["boxes"]) <= 100
        assert (found["boxes"][:, :2] >= 0).all()
        assert (found["boxes"][:, 2:] <= torch.tensor([width, height]) + 1e-3).all()
        assert (found["scores"].diff() <= 0).all()
        assert found["labels"].dtype == torch.int64


@pytest.mark.parametrize("detector", DETECTORS)
def test_it_learns_to_find_rectangles(detector):
    images, targets = zip(
        rectangles(64, 64, (4, 6, 30, 36), (34, 26, 60, 60)),
        rectangles(64, 80, (40, 30, 76, 60), (3, 3, 30, 23)),
        strict=True,
    )
    # Anchors that fit no rectangle well would find each again, with confidence.
    model = tiny(detector, min_size=64, max_size=96, shape_iou=0.45).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(90):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        detections = model(images)
    for target, found in zip(targets, detections, strict=True):
        confident = found["scores"] > 0.3
        same = found["labels"][confident][:, None] == target["labels"]
        overlaps = box_iou(found["boxes"][confident], target["boxes"]) * same
        assert (overlaps > 0.5).any(0).all(), "every rectangle is found, with its label"
        assert (overlaps > 0.5).any(1).all(), "nothing else is found"


@pytest.mark.parametrize("has_avx512", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_convolution_gradients_of_large_channels_last_maps(
    kernel, stride, biased, has_avx512, monkeypatch
):
    monkeypatch.setattr(conv_block, "_HAS_AVX512", has_avx512)
    conv = nn.Conv2d(8, 16, kernel, stride, kernel // 2, bias=biased).double()
    conv.to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 24, 21, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = [x, *conv.parameters()]
    grad = torch.randn_like(conv(x))
    actual = torch.autograd.grad(convolved(conv, Maps(x)), leaves, grad)
    for a, b in zip(actual, torch.autograd.grad(conv(x), leaves, grad), strict=True):
        assert relative_error(a, b) < 1e-13
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    frozen = torch.autograd.grad(convolved(conv, Maps(x.detach())), leaves[1:], grad)
    for a, b in zip(frozen, actual[1:], strict=True):
        assert relative_error(a, b) < 1e-13


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": (*ANCHORS[:2], ())}, r"same number, at least one, .* but are \[3, 3, 0\]"),
        ({"anchors": (((0, 3),),)}, r"anchors must be positive, but one is \(0, 3\)"),
        ({"scale_xy": (1.0, 0.5, 1.0)}, "3 numbers of at least 1"),
    ],
)
def test_bad_options(options, message):
    options = {"scale_xy": (1.0,) * len(options.get("anchors", ANCHORS)), **options}
    with pytest.raises(ValueError, match=message):
        YOLOv4(3, width=0.125, depth=0.25, **options)
