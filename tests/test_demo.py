"""The demo's parts on small inputs, and exact memory counts."""

import timm
import torch

from dlkernels import demo
from dlkernels.measure import interleaved_medians, peak_cpu_memory


def test_photographs_are_real_and_normalised():
    images = demo.photographs()
    assert images.shape == (2, 3, 224, 224)
    assert abs(images.mean().item()) < 1e-4
    assert (images[0] - images[1]).abs().mean() > 0.5


def test_compare_and_chart(tmp_path):
    images = torch.randn(2, 3, 64, 64)
    result = demo.compare("small", lambda: timm.create_model("seresnet18"), images)
    assert result.swapped == 10  # eight blocks, and the first norm with its activation
    assert 0 < result.difference < 1e-3
    assert 0 < result.memory[1] <= result.memory[0]
    demo._chart([result], tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_peak_memory_is_exact():
    def call():
        a = torch.empty(1000)
        del a
        b = torch.empty(500)
        c = torch.empty(700)
        return b, c

    assert peak_cpu_memory(call) == 4 * 1200


def test_medians_name_every_call():
    assert set(interleaved_medians({"a": lambda: 1, "b": lambda: 2}, rounds=3)) == {"a", "b"}
