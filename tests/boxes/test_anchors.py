"""Anchors on regular grids."""

import pytest
import torch

from dlkernels.boxes.anchors import AnchorGrid


def test_the_default_is_that_of_atss():
    grid = AnchorGrid.for_image((800, 1344))
    assert grid.sizes == ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    assert grid.num_level_anchors == (16800, 4200, 1050, 273, 77)
    assert len(grid) == 22400
    assert grid.anchors_per_location == 1
    boxes = grid.boxes()
    assert boxes.shape == (22400, 4)
    assert boxes.dtype == torch.float32
    # The second cell of the first row, and the first of the last level.
    assert boxes[1].tolist() == [12 - 32, 4 - 32, 12 + 32, 4 + 32]
    assert boxes[-77].tolist() == [64 - 512, 64 - 512, 64 + 512, 64 + 512]


def test_order_is_level_row_column_base_anchor():
    grid = AnchorGrid.from_scales([(2, 3), (1, 2)], [4, 8], scales=[1, 2], ratios=[0.25, 1, 4])
    boxes = grid.boxes()
    position = 0
    for (height, width), stride in zip(grid.sizes, grid.strides, strict=True):
        for row in range(height):
            for column in range(width):
                for ratio in (0.25, 1, 4):
                    for scale in (1, 2):
                        x, y = (column + 0.5) * stride, (row + 0.5) * stride
                        w = stride * scale / ratio**0.5 / 2
                        h = stride * scale * ratio**0.5 / 2
                        assert boxes[position].tolist() == [x - w, y - h, x + w, y + h]
                        position += 1
    assert position == len(boxes) == len(grid)


def test_offset_of_older_detectors():
    grid = AnchorGrid.from_scales([(2, 2)], [8], scales=[2], offset=0.0)
    assert grid.boxes()[0].tolist() == [-8, -8, 8, 8]


def test_inside():
    grid = AnchorGrid.from_scales([(4, 6)], [8], scales=[2])
    inside = grid.inside((32, 48)).view(4, 6)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1:3, 1:5] = True
    assert torch.equal(inside, expected)
    assert grid.inside((32, 48), border=4).all()


def test_to_moves_the_base_anchors():
    grid = AnchorGrid.from_scales([(2, 2)], [8]).to("meta")
    assert grid.base_anchors[0].device.type == "meta"
    assert grid.boxes().device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), (), ()), "sizes must have at least one level"),
        ((((2, 2),), (8, 16), (torch.ones(1, 4),)), "strides must have one entry per level"),
        ((((2, -1),), (8,), (torch.ones(1, 4),)), r"sizes must be \(height, width\).*-1"),
        ((((2, 2),), (0,), (torch.ones(1, 4),)), "strides must be positive, but one is 0"),
        ((((2, 2),), (8,), (torch.ones(4),)), r"base_anchors must be float32.*\[4\]"),
        ((((2, 2),), (8,), (torch.ones(1, 4).half(),)), "base_anchors must be float32.*float16"),
        ((((2, 2),), (8,), (torch.ones(0, 4),)), r"at least one, on every level.*\[0\]"),
        ((((2, 2),) * 2, (8, 16), (torch.ones(1, 4), torch.ones(2, 4))), r"same number.*\[1, 2\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnchorGrid(*arguments)
