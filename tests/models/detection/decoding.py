"""What all detectors owe an export: the same predictions, up to the suppression."""

import onnxruntime
import torch
from torch import Tensor, nn

from dlkernels.models.detection import Detector
from tests.numbers import relative_error


class Decoded(nn.Module):
    """All that a detector does up to the suppression."""

    def __init__(self, model: Detector):
        super().__init__()
        self.model = model

    def forward(self, x):
        return tuple(self.model.decode(self.model.raw_outputs(x)))


def check_decoding_exports_and_compiles(detector: Detector, x: Tensor, backend: str) -> None:
    """ONNX and torch.compile, of one graph, give what eager mode gives."""
    model = Decoded(detector)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    program = torch.onnx.export(model, (x,), input_names=["x"], dynamo=True, verbose=False)
    data = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(x)
        for a, b in zip(compiled(x), expected, strict=True):
            assert relative_error(a, b) < 1e-5
    for a, b in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
        assert relative_error(torch.from_numpy(a), b) < 1e-4
