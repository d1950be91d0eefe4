"""Training steps of YOLOv4 against the same network of plain PyTorch modules.

A step is forward, losses, backward and an SGD step with momentum, of the full width on images of
416 x 416 with 20 objects each. Both networks have the same losses, so that only modules differ.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.peers import DEVICE, FORMATS, rows
from dlkernels.measure import interleaved_medians, peak_cpu_memory
from dlkernels.models.detection import YOLOv4
from tests.models.detection.plain_yolo import PlainYOLOv4

SIZE = 416
OBJECTS = 20
ROUNDS = 3  # a step takes seconds
WARM_UP = 4  # steps until the heap has grown to its full size: page faults take seconds before


class PlainDetector(YOLOv4):
    """YOLOv4 whose network is made of convolutions, batch norms and activations one by one."""

    def __init__(self):
        super().__init__()
        del self.backbone, self.neck
        widths, blocks = (32, 64, 128, 256, 512, 1024), (1, 2, 8, 8, 4)
        self.network = PlainYOLOv4(widths, blocks, self.values_per_cell)

    def raw_outputs(self, batch: Tensor) -> list[Tensor]:
        return self.network(batch)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("batch", [1, 4])
def test_yolov4_training_step(benchmark, batch, memory_format):
    torch.set_num_threads(2)
    detectors = {"dlkernels": YOLOv4(), "plain": PlainDetector()}
    calls = {
        name: _training_step(detector, batch, memory_format) for name, detector in detectors.items()
    }
    medians = interleaved_medians(calls, ROUNDS, WARM_UP)
    row = {"benchmark": f"{benchmark.name.removeprefix('test_')}"}
    row |= {f"{name} s": medians[name] for name in calls}
    row["time over plain"] = medians["dlkernels"] / medians["plain"]
    if DEVICE == "cpu":
        peaks = {name: peak_cpu_memory(call) / 2**20 for name, call in calls.items()}
        row |= {f"{name} MiB": round(peak) for name, peak in peaks.items()}
        row["memory over plain"] = peaks["dlkernels"] / peaks["plain"]
    rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(calls["dlkernels"], rounds=1)


def _training_step(
    detector: YOLOv4, batch: int, memory_format: torch.memory_format
) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    detector.transform.min_size, detector.transform.max_size = (SIZE,), SIZE
    detector.to(DEVICE, memory_format=memory_format)
    images = torch.rand(batch, 3, SIZE, SIZE, generator=generator).to(DEVICE)
    corner, size = (torch.rand(2, OBJECTS, 2, generator=generator) * SIZE / 2).unbind()
    target = {
        "boxes": torch.cat((corner, corner + size + 4), 1).to(DEVICE),
        "labels": torch.randint(80, (OBJECTS,), generator=generator).to(DEVICE),
    }
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        sum(detector(images, [target] * batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
