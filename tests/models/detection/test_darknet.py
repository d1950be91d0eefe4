"""Darknet's files, written by a writer of the tests' own."""

import json
import struct

import pytest
import torch
from PIL import Image
from torch import nn

from dlkernels import cli
from dlkernels.models.detection import Darknet, YOLOv4, load_weights, save_weights
from dlkernels.models.detection.darknet import parse_cfg

# ---- cfg of YOLOv4, from the structure of the network -------------------------------------------


class CfgWriter:
    """Lines of a cfg; each method returns the number of the layer that it adds."""

    def __init__(self):
        self.text = "[net]\nwidth=64\nheight=64\nchannels=3\n"
        self.count = 0

    def add(self, kind, **options):
        lines = "".join(f"{name}={value}\n" for name, value in options.items())
        self.text += f"\n[{kind}]  # layer {self.count}\n{lines}"
        self.count += 1
        return self.count - 1

    def conv(self, filters, size=1, stride=1, activation="leaky", normalized=True):
        normalize = {"batch_normalize": 1} if normalized else {}
        options = {"filters": filters, "size": size, "stride": stride, "pad": 1}
        return self.add("convolutional", **normalize, **options, activation=activation)

    def route(self, *layers):
        return self.add("route", layers=",".join(str(layer - self.count) for layer in layers))

    def convs(self, hidden, count):
        for index in range(count):
            last = self.conv(*((2 * hidden, 3) if index % 2 else (hidden, 1)))
        return last

    def head(self, hidden, mask, scale, classes):
        self.conv(2 * hidden, 3)
        self.conv(3 * (5 + classes), activation="linear", normalized=False)
        anchors = "12,16, 19,36, 40,28, 36,75, 76,55, 72,146, 142,110, 192,243, 459,401"
        options = {"ignore_thresh": 0.7, "iou_thresh": 0.213, "scale_x_y": scale}
        self.add("yolo", mask=mask, anchors=anchors, classes=classes, num=9, **options)


def yolov4_cfg(widths, blocks, classes):
    cfg = CfgWriter()
    cfg.conv(widths[0], 3, activation="mish")
    stages = []
    for stage, count in enumerate(blocks):
        out = widths[stage + 1]
        part = out if stage == 0 else out // 2
        down = cfg.conv(out, 3, 2, "mish")
        left = cfg.conv(part, activation="mish")
        cfg.route(down)
        cfg.conv(part, activation="mish")
        for _ in range(count):
            cfg.conv(out // 2, activation="mish")
            cfg.conv(part, 3, activation="mish")
            cfg.add("shortcut", **{"from": -3}, activation="linear")
        after = cfg.conv(part, activation="mish")
        cfg.route(after, left)
        stages.append(cfg.conv(out, activation="mish"))
    fine, middle, coarse = (width // 2 for width in widths[-3:])
    x = cfg.convs(coarse, 3)
    pools = []
    for size in (5, 9, 13):
        if pools:
            cfg.route(x)
        pools.append(cfg.add("maxpool", stride=1, size=size))
    cfg.route(*reversed(pools), x)
    p5 = cfg.convs(coarse, 3)
    cfg.conv(middle)
    above = cfg.add("upsample", stride=2)
    cfg.route(stages[3])
    lateral = cfg.conv(middle)
    cfg.route(lateral, above)
    p4 = cfg.convs(middle, 5)
    cfg.conv(fine)
    above = cfg.add("upsample", stride=2)
    cfg.route(stages[2])
    lateral = cfg.conv(fine)
    cfg.route(lateral, above)
    p3 = cfg.convs(fine, 5)
    cfg.head(fine, "0,1,2", 1.2, classes)
    cfg.route(p3)
    cfg.route(cfg.conv(middle, 3, 2), p4)
    p4 = cfg.convs(middle, 5)
    cfg.head(middle, "3,4,5", 1.1, classes)
    cfg.route(p4)
    cfg.route(cfg.conv(coarse, 3, 2), p5)
    cfg.convs(coarse, 5)
    cfg.head(coarse, "6,7,8", 1.05, classes)
    return cfg.text


CFG = yolov4_cfg((8, 8, 16, 32, 64, 128), (1, 1, 2, 2, 1), classes=2)


def tiny():
    model = YOLOv4(2, width=0.125, depth=0.25, min_size=64, max_size=64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def write_weights(path, model, version=(0, 2, 5), seen=6400):
    """The writer: the state dict's entries, one by one."""
    entries = dict(model.state_dict())
    with path.open("wb") as file:
        file.write(
            struct.pack("<3i", *version) + struct.pack("<q" if version[1] > 1 else "<i", seen)
        )
        for name in entries:
            if not name.endswith(".weight") or "norm." in name:
                continue
            norm = name.removesuffix("conv.weight") + "norm."
            if norm + "weight" in entries:
                before = [norm + key for key in ("bias", "weight", "running_mean", "running_var")]
            else:
                before = [name.removesuffix("weight") + "bias"]
            for key in (*before, name):
                values = entries[key].flatten().tolist()
                file.write(struct.pack(f"<{len(values)}f", *values))


@pytest.mark.parametrize("version", [(0, 2, 5), (0, 1, 0)])
def test_weights_of_a_separate_writer(tmp_path, version):
    model = tiny()
    path = tmp_path / "random.weights"
    write_weights(path, model, version)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = model.raw_outputs(x)
        for other in (YOLOv4(2, width=0.125, depth=0.25), Darknet(CFG)):
            assert load_weights(other, path) == 6400
            for a, b in zip(other.eval().raw_outputs(x), expected, strict=True):
                torch.testing.assert_close(a, b)


def test_round_trip(tmp_path):
    model = tiny()
    first, second = tmp_path / "first.weights", tmp_path / "second.weights"
    save_weights(model, first, images_seen=123)
    other = Darknet(CFG)
    assert load_weights(other, first) == 123
    save_weights(other, second, images_seen=123)
    assert first.read_bytes() == second.read_bytes()
    write_weights(second, model, seen=123)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_published_structure():
    text = yolov4_cfg((32, 64, 128, 256, 512, 1024), (1, 2, 8, 8, 4), classes=80)
    with torch.device("meta"):
        model, ours = Darknet(text), YOLOv4()
    assert len(model.sections) == 162
    assert [p.shape for p in model.parameters()] == [p.shape for p in ours.parameters()]
    assert model.anchors == ours.anchors
    assert model.scale_xy == ours.scale_xy
    assert (model.ignore_iou, model.shape_iou) == (ours.ignore_iou, ours.shape_iou)


def test_a_cfg_trains():
    model = Darknet(CFG).train()
    target = {"boxes": torch.tensor([[3.0, 4, 40, 50]]), "labels": torch.tensor([1])}
    sum(model([torch.rand(3, 64, 64)], [target]).values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_two_heads_groups_and_strided_pools():
    cfg = CfgWriter()
    first = cfg.conv(8, 3, 2)
    cfg.add("route", layers=-1, groups=2, group_id=1)
    half = cfg.conv(4, 3)
    cfg.route(half, first)
    for _ in range(3):
        cfg.add("maxpool", size=2, stride=2)
    cfg.conv(8, 3)
    middle = cfg.count - 1
    cfg.add("maxpool", size=2, stride=2)
    cfg.head(8, "3,4,5", 1.05, 2)
    cfg.route(middle)
    cfg.head(8, "1,2,3", 1.05, 2)
    model = Darknet(cfg.text).eval()
    with torch.no_grad():
        shapes = [tuple(x.shape) for x in model.raw_outputs(torch.rand(1, 3, 64, 96))]
        assert shapes == [(1, 21, 4, 6), (1, 21, 2, 3)]
        assert model.decode(model.raw_outputs(torch.rand(1, 3, 64, 96))).boxes.shape == (1, 90, 4)


def test_detect_with_a_cfg(tmp_path, capsys):
    image, cfg, weights, names = (
        tmp_path / name for name in ("image.png", "tiny.cfg", "tiny.weights", "tiny.names")
    )
    Image.new("RGB", (64, 64), "red").save(image)
    cfg.write_text(CFG)
    model = tiny()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:  # those of the heads
            nn.init.zeros_(module.weight)
            nn.init.ones_(module.bias)
    write_weights(weights, model)
    names.write_text("cat\ndog\n")
    arguments = ["detect", str(image), "--cfg", str(cfg), "--weights", str(weights)]
    arguments += ["--output", str(tmp_path / "out"), "--threshold", "0"]
    cli.main([*arguments, "--names", str(names)])
    (found,) = json.loads(capsys.readouterr().out)
    assert {item["class"] for item in found["detections"]} <= {"cat", "dog"}
    assert found["detections"]
    assert (tmp_path / "out" / "image.png").is_file()
    cli.main(arguments)
    (numbered,) = json.loads(capsys.readouterr().out)
    assert {item["class"] for item in numbered["detections"]} <= {"0", "1"}

    names.write_text("cat\n")
    with pytest.raises(SystemExit, match=r"tiny.names must have the 2 classes of .*tiny.cfg"):
        cli.main([*arguments, "--names", str(names)])
    with pytest.raises(SystemExit, match=r"no model is to be named, but 'atss' is"):
        cli.main([*arguments, "--model", "atss"])
    with weights.open("ab") as file:
        file.write(b"\0" * 4)
    with pytest.raises(SystemExit, match=r"tiny.weights .*: 4 are left after the last layer"):
        cli.main(arguments)
    cfg.write_text(CFG.replace("[upsample]", "[lstm]"))
    with pytest.raises(SystemExit, match=r"tiny.cfg: \[lstm\] in line \d+"):
        cli.main(arguments)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (
            -4,
            "short.weights must have {n} bytes .* has {m}: it ends in layer neck.head_coarse.last",
        ),
        (1000, "short.weights must have {n} bytes .* has {m}: it ends in layer backbone.stem"),
        (8, "short.weights must begin with a header, but has only 8 bytes"),
        (15, "short.weights must begin with a header of 20 bytes, but has only 15"),
    ],
)
def test_a_file_cut_short(tmp_path, keep, message):
    path = tmp_path / "short.weights"
    save_weights(tiny(), path)
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    message = message.format(n=len(data), m=len(data[:keep]))
    other = tiny()
    before = [tensor.clone() for tensor in other.state_dict().values()]
    with pytest.raises(ValueError, match=message):
        load_weights(other, path)
    assert all(map(torch.equal, before, other.state_dict().values()))


def test_a_file_too_long(tmp_path):
    path = tmp_path / "long.weights"
    save_weights(tiny(), path)
    with path.open("ab") as file:
        file.write(b"\0" * 12)
    with pytest.raises(
        ValueError, match=r"long.weights .*: 12 are left after the last layer, neck"
    ):
        load_weights(tiny(), path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[net]", "[convolutional]", r"\[convolutional\] in line 1: the first section must be"),
        ("[upsample]", "[lstm]", r"\[lstm\] in line \d+: a section of this kind is not known"),
        ("filters=8\n", "", r"\[convolutional\] in line 6: filters is missing"),
        ("filters=8\n", "filters=many\n", "line 6: filters must be a number, but is 'many'"),
        ("activation=mish", "activation=tanh", "line 6: activation must be one of .*'tanh'"),
        ("filters=21", "filters=20", r"\[yolo\] .* must have 21 filters, but has 20"),
        ("from=-3", "from=-300", r"\[shortcut\] in line \d+: it is layer 7 .* reads -293"),
        ("width=64", "width", "line 2 must be a .section. or name=value, but is 'width'"),
        ("[yolo]", "[maxpool]", r"the cfg must have a \[yolo\] section, but has none"),
    ],
)
def test_bad_cfg(old, new, message):
    assert old in CFG
    with pytest.raises(ValueError, match=message):
        Darknet(CFG.replace(old, new, 1) if old != "[yolo]" else CFG.replace(old, new))


def test_comments_and_blanks():
    (section,) = parse_cfg("# nothing\n\n[net] ; first\n width = 3 # wide\n")
    assert (section.kind, section.line, section.options) == ("net", 3, {"width": "3"})
