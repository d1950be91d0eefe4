"""The counter itself."""

import torch
import triton
import triton.language as tl

from tests.gpu_proof.traffic import count_traffic


@triton.jit
def copy_kernel(source, target, size, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    tl.store(target + i, tl.load(source + i * STRIDE, mask), mask)


def test_masked_lanes_move_nothing():
    source, target = torch.arange(40.0), torch.zeros(40)
    with count_traffic() as traffic:
        copy_kernel[(2,)](source, target, 40, 1, 32)
    assert torch.equal(source, target)
    assert (traffic.loaded, traffic.stored) == (160, 160)


def test_scattered_lanes_move_whole_sectors():
    source, target = torch.arange(512.0), torch.zeros(32)
    with count_traffic() as traffic:
        copy_kernel[(1,)](source, target, 32, 16, 32)
    assert traffic.moved == 256
    assert traffic.sectors >= 32 * 32 + 128
