"""What PyTorch needs of the losses: opcheck, compile, export, autocast, saved tensors, memory."""

import pytest
import torch

from dlkernels import ops, use_backend
from dlkernels.measure import peak_cpu_memory
from tests.boxes.cases import KINDS, make_boxes, make_labels, make_targets

BOX_OP = torch.ops.dlkernels.box_iou_loss.default
FOCAL_OP = torch.ops.dlkernels.sigmoid_focal_loss.default


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_box_iou_loss(kind, summed):
    pred, target = (t.requires_grad_() for t in make_boxes((3, 7)))
    torch.library.opcheck(BOX_OP, (pred, target, kind, summed, 1e-7))
    torch.library.opcheck(BOX_OP, (pred[:, ::2], target[:, ::2], kind, summed, 1e-7))


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("form", ["labels", "targets"])
def test_opcheck_of_sigmoid_focal_loss(form, summed):
    logits = torch.randn(6, 9, requires_grad=True)
    targets = make_targets((6, 9), torch.float32, form)
    for weight in (None, torch.rand(6)):
        torch.library.opcheck(FOCAL_OP, (logits, targets, weight, 0.75, 0.25, 2.0, summed))


def test_opcheck_of_backward():
    utils = ("test_schema", "test_faketensor")
    pred, target = make_boxes((7,))
    logits, labels = torch.randn(6, 9), make_labels((6, 9))
    box = torch.ops.dlkernels.box_iou_loss_backward.default
    focal = torch.ops.dlkernels.sigmoid_focal_loss_backward.default
    for grad in (torch.rand(()), torch.rand(7)):
        torch.library.opcheck(box, (grad, pred, target, "giou", 1e-7), test_utils=utils)
    for grad in (torch.rand(()), torch.rand(6, 9)):
        arguments = grad, logits, labels, None, 0.75, 0.25, 2.0
        torch.library.opcheck(focal, arguments, test_utils=utils)


def total_loss(pred, target, logits, labels):
    box = ops.box_iou_loss(pred, target, "ciou", reduction="sum")
    return box + ops.sigmoid_focal_loss(logits, labels, reduction="mean")


def inputs():
    return [*make_boxes((12,)), torch.randn(20, 5), make_labels((20, 5))]


def test_compile_without_graph_breaks():
    tensors = inputs()
    pred, logits = (tensors[i].requires_grad_() for i in (0, 2))
    expected = total_loss(*tensors)
    wanted = torch.autograd.grad(expected, (pred, logits))
    actual = torch.compile(total_loss, fullgraph=True)(*tensors)
    grads = torch.autograd.grad(actual, (pred, logits))
    torch.testing.assert_close(actual, expected)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_export_uses_the_formula():
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return total_loss(*tensors)

    tensors = inputs()
    program = torch.export.export(Module(), tuple(tensors))
    assert not any("dlkernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*tensors), total_loss(*tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Losses stay in float32, and mixed dtypes meet in the wider one."""
    pred, target, logits, labels = inputs()
    leaf, box_leaf = logits.to(dtype).requires_grad_(), pred.to(dtype).requires_grad_()
    targets = make_targets((20, 5), torch.float32, "targets")
    with torch.autocast("cpu", dtype):
        by_label = ops.sigmoid_focal_loss(leaf, labels)
        by_target = ops.sigmoid_focal_loss(leaf, targets)
        box = ops.box_iou_loss(box_leaf, target)
    assert by_label.dtype == by_target.dtype == box.dtype == torch.float32
    assert torch.equal(by_label, ops.sigmoid_focal_loss(leaf, labels))
    assert torch.equal(by_target, ops.sigmoid_focal_loss(leaf.float(), targets))
    assert torch.equal(box, ops.box_iou_loss(box_leaf.float(), target))
    (by_label.sum() + by_target.sum() + box.sum()).backward()
    assert leaf.grad.dtype == box_leaf.grad.dtype == dtype


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return sorted(t.data_ptr() for t in saved)


def test_saved_for_backward():
    pred, target, logits, labels = inputs()
    pred.requires_grad_()
    logits.requires_grad_()
    weight = torch.rand(20)
    saved = saved_by(lambda: ops.box_iou_loss(pred, target, "ciou", "mean"))
    assert saved == sorted(t.data_ptr() for t in (pred, target))
    saved = saved_by(
        lambda: ops.sigmoid_focal_loss(logits, labels, weight=weight, reduction="mean")
    )
    assert saved == sorted(t.data_ptr() for t in (logits, labels, weight))


def test_peak_memory_of_a_step():
    """A summed loss stores a number per block of 4096 elements, its gradient, and nothing else."""
    rows, classes = 4096, 80
    logits = torch.randn(rows, classes, requires_grad=True)
    labels = make_labels((rows, classes))

    def step():
        ops.sigmoid_focal_loss(logits, labels, reduction="sum").backward()
        logits.grad = None

    step()
    gradient = logits.numel() * 4
    assert gradient <= peak_cpu_memory(step) <= gradient + 4 * 80 + 1024

    pred, target = make_boxes((8192,))
    pred.requires_grad_()

    def box_step():
        ops.box_iou_loss(pred, target, "ciou", "sum").backward()
        pred.grad = None

    box_step()
    assert pred.numel() * 4 <= peak_cpu_memory(box_step) <= pred.numel() * 4 + 1024


def test_only_what_requires_a_gradient_gets_one():
    pred, target = make_boxes((9,))
    target.requires_grad_()
    ops.box_iou_loss(pred, target, "giou").sum().backward()
    assert pred.grad is None
    by_swapping = pred.clone(), target.detach().clone().requires_grad_()
    ops.box_iou_loss(*reversed(by_swapping), "giou").sum().backward()
    assert torch.equal(target.grad, by_swapping[1].grad)


def test_second_derivative_is_refused_and_the_reference_has_it():
    pred, target, logits, labels = inputs()
    pred.requires_grad_()
    logits.requires_grad_()

    def second(loss, leaf):
        (first,) = torch.autograd.grad(loss(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    box = lambda: ops.box_iou_loss(pred, target).sum()  # noqa: E731
    focal = lambda: ops.sigmoid_focal_loss(logits, labels).sum()  # noqa: E731
    for loss, leaf in ((box, pred), (focal, logits)):
        with pytest.raises(NotImplementedError, match="_loss_backward"):
            second(loss, leaf)
        with use_backend("reference"):
            assert second(loss, leaf).abs().sum() > 0
