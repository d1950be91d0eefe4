"""Training end to end on a few small images: data, resume after a kill, several processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_digits_coco
import pytest
import torch
from detection.augment import Batches, TrainingSamples, flipped, mosaic
from detection.coco import read_coco
from detection.ema import MovingAverage
from detection.evaluation import coco_map
from PIL import Image
from torch import nn
from train_detector import detector_options, fitted_anchors, main, parsed

from dlkernels import cli
from dlkernels.models.detection import checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "examples" / "train_detector.py")
OPTIONS = ["--small", "--image-size=64", "--batch-size=4", "--epochs=2", "--warm-up=2"]
OPTIONS += ["--threads=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    make_digits_coco.make(folder, train=16, val=4, size=64, seed=0)
    return folder


@pytest.fixture
def copy(data, tmp_path):
    """An annotation file to spoil: its content, and a function that writes and reads it."""
    content = json.loads((data / "train.json").read_text())
    file = tmp_path / "train.json"

    def read():
        file.write_text(json.dumps(content))
        return read_coco(data / "train", file)

    return content, read


def command(data, run, *more, processes=None):
    python = [sys.executable]
    if processes:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*python, SCRIPT, str(data), str(run), *OPTIONS, *more]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# ---- data ---------------------------------------------------------------------------------------


def test_digits_are_the_same_for_a_seed_and_share_nothing_between_splits(data, tmp_path):
    make_digits_coco.make(tmp_path, train=2, val=1, size=64, seed=0)
    for name in ("train/00001.png", "val/00000.png"):
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes()
    train, val = make_digits_coco.sources(0)
    assert len(train.glyphs) + len(val.glyphs) == 1797
    assert {p.shape[1] for p in train.photographs + val.photographs} == {512, 128}


def test_digits_boxes_hold_the_ink(data):
    entries = read_coco(data / "train", data / "train.json").entries
    counts = [len(entry.boxes) for entry in entries]
    assert min(counts) >= 1
    assert max(counts) <= 12
    sides = torch.cat([entry.target()["boxes"] for entry in entries])
    assert (sides[:, 3] - sides[:, 1]).min() < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, float("nan"), 4]}, "bbox must be four finite numbers"),
        ({"bbox": [1, 2, -3, 4]}, "width and height above 0"),
        ({"bbox": [60, 2, 10, 4]}, "inside its image of 64 x 64 pixels, 00000.png"),
        ({"category_id": 10}, "has the unknown category 10"),
        ({"image_id": 99}, "is of image 99, which is not there"),
    ],
)
def test_bad_annotations_are_named(copy, change, message):
    content, read = copy
    content["annotations"][0].update(change)
    with pytest.raises(ValueError, match=rf"train\.json: annotation 1\b.*{message}"):
        read()


def test_bad_files_are_named(copy, data, tmp_path):
    content, read = copy
    content["images"][3]["file_name"] = "gone.png"
    with pytest.raises(ValueError, match=r"train\.json: 1 of 16 .* image 3, gone\.png"):
        read()
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"cut\.json is not JSON"):
        read_coco(data / "train", tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json must have a list of images"):
        read_coco(data / "train", tmp_path / "list.json")


def test_flip_and_mosaic_move_boxes_with_their_pixels(data):
    samples = TrainingSamples(read_coco(data / "train", data / "train.json"), 0, 0, seed=0)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 10:20, 30:50] = 255
    target = {"boxes": torch.tensor([[30.0, 10, 50, 20]]), "labels": torch.tensor([3])}
    made = [flipped(image, target)]
    for seed in range(10):
        made.append(mosaic([(image, target)] * 4, torch.Generator().manual_seed(seed)))
    boxes = [(picture, box) for picture, t in made for box in t["boxes"].int().tolist()]
    assert len(boxes) > 10
    for picture, (x1, y1, x2, y2) in boxes:
        assert (picture[:, y1:y2, x1:x2] == 255).all()
    key = (1, 3)
    assert torch.equal(samples[key][0], samples[key][0])


def test_processes_share_every_batch():
    whole = list(Batches(10, 4, seed=0, steps=5))
    parts = [list(Batches(10, 4, 0, 5, rank=rank, processes=2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(b) for b in whole]
    assert list(Batches(10, 4, 0, 5, first_step=3)) == whole[3:]
    with pytest.raises(ValueError, match="multiple of the 3 processes, but is 4"):
        Batches(10, 4, 0, 5, processes=3)


# ---- parts --------------------------------------------------------------------------------------


def test_map_of_the_truth_is_one_and_of_nothing_zero(data):
    val = read_coco(data / "val", data / "val.json")
    truth = [{**e.target(), "scores": torch.ones(len(e.boxes))} for e in val.entries]
    assert coco_map(val, truth) == {"mAP": 1.0, "mAP50": 1.0}
    nothing = [{key: value[:0] for key, value in image.items()} for image in truth]
    assert coco_map(val, nothing) == {"mAP": 0.0, "mAP50": 0.0}


def test_moving_average_follows_the_formula():
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    average = MovingAverage(model, 0.9, warm_up=2)
    nn.init.ones_(model.weight)
    average.update(model, 0)
    expected = 1 - 0.9 * (1 - torch.tensor(-0.5).exp())
    torch.testing.assert_close(average.model.weight.squeeze(), expected)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"a": 1})

    def fails(content, file):
        file.write(b"half")
        raise OSError("no space")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"a": 2})
    monkeypatch.undo()
    assert torch.load(path) == {"a": 1}


def test_anchors_of_yolo_fit_the_training_boxes(data):
    train = read_coco(data / "train", data / "train.json")
    options = parsed([str(data), "run", "--model", "yolov4", "--image-size", "128"])
    anchors = torch.tensor(detector_options(options, train)["anchors"])
    boxes = torch.cat([entry.target()["boxes"] for entry in train.entries])
    sizes = 2 * (boxes[:, 2:] - boxes[:, :2])  # images of 64 pixels
    assert anchors.shape == (3, 3, 2)
    assert (anchors.flatten(0, 1).prod(1).diff() > 0).all()
    assert (anchors.amin((0, 1)) >= sizes.amin(0)).all()


def test_anchors_stand_at_the_level_whose_stride_suits_their_boxes():
    side = torch.linspace(10, 300, 400)
    sizes = torch.stack((0.8 * side, 1.25 * side), 1)
    fine, middle, coarse = (torch.tensor(level).prod(1).sqrt() for level in fitted_anchors(sizes))
    assert 10 < fine.min() < fine.max() < 32 < middle.min() < middle.max() < 64 < coarse.min()
    # No box suits the other levels: the same shapes in the levels' scales.
    fine, middle, coarse = map(torch.tensor, fitted_anchors(sizes[side < 30]))
    assert torch.equal(middle, 2 * fine)
    assert torch.equal(coarse, 4 * fine)
    fine, middle, coarse = map(torch.tensor, fitted_anchors(sizes[side > 70]))
    assert torch.equal(fine, coarse / 4)
    assert torch.equal(middle, coarse / 2)


# ---- training -----------------------------------------------------------------------------------


def state_of(run):
    found = checkpoint.read(run / "checkpoint.pt")
    training = found["training"]
    momentum = training["optimizer"]["state"]
    tensors = {f"average {k}": v for k, v in found["weights"].items()}
    tensors |= {f"model {k}": v for k, v in training["model"].items()}
    tensors |= {f"momentum {k}": v["momentum_buffer"] for k, v in momentum.items()}
    return training["step"], tensors


def rows_of(run):
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]


def test_resume_after_a_kill_gives_the_same_bits(data, tmp_path):
    options = [
        "--mosaic",
        "0.5",
        "--flip",
        "0.5",
        "--scales",
        "64",
        "96",
        "--checkpoint-every",
        "1",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(data, whole, *options), env=ENVIRONMENT, check=True)
    process = subprocess.Popen(command(data, killed, *options), env=ENVIRONMENT)
    while not (killed / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step, _ = state_of(killed)
    assert 0 < step < 8
    subprocess.run(command(data, killed, *options, "--resume"), env=ENVIRONMENT, check=True)
    (step, actual), (_, expected) = state_of(killed), state_of(whole)
    assert step == 8
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert rows_of(killed) == rows_of(whole)


def test_two_processes_equal_one(data, tmp_path):
    options = ["--freeze-norm", "--lr", "0.001"]
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(command(data, one, *options), env=ENVIRONMENT, check=True)
    subprocess.run(command(data, two, *options, processes=2), env=ENVIRONMENT, check=True)
    for a, b in zip(rows_of(two), rows_of(one), strict=True):
        for name in ("loss_class", "loss_box", "loss_centerness"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4)
    (_, actual), (_, expected) = state_of(two), state_of(one)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_train_and_detect(data, tmp_path, capsys):
    run = tmp_path / "run"
    main([str(data), str(run), *OPTIONS, "--amp", "--backend", "reference"])
    rows = rows_of(run)
    assert [row["step"] for row in rows] == ["4", "8"]
    assert 0 <= float(rows[-1]["mAP50"]) <= 1
    assert list(run.glob("events.out.tfevents*"))
    assert Image.open(run / "predictions.png").size == (1024, 256)

    capsys.readouterr()
    image, weights = data / "val" / "00000.png", run / "checkpoint.pt"
    out = tmp_path / "out"
    options = ["--model", "atss", "--weights", str(weights), "--output", str(out)]
    cli.main(["detect", str(image), *options, "--threshold", "0"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["image"] == str(image)
    assert all(set(item) == {"box", "score", "class"} for item in found["detections"])
    assert Image.open(out / "00000.png").size == (64, 64)
    with pytest.raises(SystemExit, match=r"train\.json is no image"):
        cli.main(["detect", str(data / "train.json"), *options])
    with pytest.raises(SystemExit, match=r"00000\.png is no checkpoint"):
        cli.main(["detect", str(image), "--weights", str(image)])
    with pytest.raises(SystemExit, match="--resume continues it"):
        main([str(data), str(run), *OPTIONS])
    others = ["--amp", "--backend", "reference", "--resume", "--lr", "0.5"]
    with pytest.raises(SystemExit, match=r"of a run with lr 0\.08, not 0\.5"):
        main([str(data), str(run), *OPTIONS, *others])


@pytest.mark.parametrize("model", checkpoint.DETECTORS)
def test_every_detector_learns_and_comes_back_from_its_file(model, tmp_path):
    config = checkpoint.DetectorConfig(model, ("a", "b"), 64, True, {})
    detector = config.build()
    target = {"boxes": torch.tensor([[8.0, 8, 24, 32]]), "labels": torch.tensor([1])}
    sum(detector(torch.rand(2, 3, 64, 64), [target] * 2).values()).backward()
    assert not [name for name, p in detector.named_parameters() if p.grad is None]
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, checkpoint.content(config, detector.state_dict()))
    loaded, classes = checkpoint.load_detector(path)
    assert classes == ("a", "b")
    assert type(loaded) is type(detector)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, detector.state_dict()[name]), name


def test_images_without_boxes_train(data, tmp_path):
    content = json.loads((data / "train.json").read_text())
    content["annotations"] = []
    for name in ("train", "val"):
        (tmp_path / name).symlink_to(data / name)
    (tmp_path / "train.json").write_text(json.dumps(content))
    (tmp_path / "val.json").write_text((data / "val.json").read_text())
    run = tmp_path / "run"
    main([str(tmp_path), str(run), *OPTIONS, "--epochs=1"])
    assert float(rows_of(run)[0]["loss_class"]) > 0
