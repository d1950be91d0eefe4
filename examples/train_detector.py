"""Trains a detector on data in COCO's format and evaluates it.

    python examples/make_digits_coco.py out/digits
    python examples/train_detector.py out/digits out/atss --model atss --small
    torchrun --nproc_per_node 2 examples/train_detector.py out/digits out/atss --model atss

The data folder holds train.json and val.json and the images in train/ and val/. The run's folder
gets ``checkpoint.pt``, which ``python -m dlkernels detect`` reads, ``metrics.csv``, events for
TensorBoard and ``predictions.png``. ``--resume`` continues after a kill at any moment; on a CPU
with the same bits as if there had been none.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detection.augment import Batches, TrainingSamples, seeded
from detection.coco import CocoData, read_coco
from detection.ema import MovingAverage
from detection.evaluation import coco_map, detections_of, save_picture
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from dlkernels import use_backend
from dlkernels.boxes.kmeans import cluster_box_sizes
from dlkernels.models.detection import checkpoint
from dlkernels.models.detection.checkpoint import DETECTORS, DetectorConfig
from dlkernels.models.detection.yolo_head import STRIDES

LEAST_CELLS = 2  # of a level, in the side of the boxes that its anchors are fitted to


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path, help="folder with train.json, val.json, train/ and val/")
    add("run", type=Path, help="folder that gets the results")
    add("--model", choices=DETECTORS, default="atss")
    add("--small", action="store_true", help="a narrow network, for small images and machines")
    add("--assigner", choices=("atss", "max_iou", "fcos"), help="of ATSS")
    add("--image-size", type=int, default=128, help="shorter side that images are resized to")
    add("--scales", type=int, nargs="*", default=[], help="image sizes, one drawn for each step")
    add("--mosaic", type=float, default=0.0, help="probability of a sample of four images")
    add("--flip", type=float, default=0.0, help="probability of a mirrored sample")
    add("--epochs", type=int, default=12)
    add("--batch-size", type=int, default=8, help="over all processes")
    add("--lr", type=float, default=0.08)
    add("--warm-up", type=int, default=100, help="steps")
    add("--weight-decay", type=float, default=1e-4)
    add("--clip-norm", type=float, default=10.0, help="of all gradients together")
    add("--ema", type=float, default=0.998, help="decay of the moving average that is evaluated")
    add("--freeze-norm", action="store_true", help="batch norms keep their running statistics")
    add("--amp", action="store_true", help="the network in bfloat16")
    add("--backend", choices=("cpp", "cuda", "triton", "reference"), help="for every op")
    add("--threads", type=int, help="of a process")
    add("--workers", type=int, default=0, help="processes that load images; 0 caches them instead")
    add("--seed", type=int, default=0)
    add("--checkpoint-every", type=int, help="steps; by default an epoch")
    add("--evaluate-every", type=int, default=2, help="epochs")
    add("--resume", action="store_true", help="continue the run in the folder")
    options = parser.parse_args(arguments)
    if options.assigner and options.model != "atss":
        parser.error(f"--assigner is an option of atss, not of {options.model}")
    return options


class Processes:
    """This process among those of torchrun; alone without it."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.count > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.count > 1:
            dist.all_reduce(value)
        return value / self.count


class Metrics:
    """Rows of ``metrics.csv``, and TensorBoard's scalars; only the first process writes.

    Args:
        folder: of the run.
        first_step: rows from this step on are dropped: they were written after the checkpoint that
            the run continues from.
    """

    def __init__(self, folder: Path, first_step: int):
        self.path = folder / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        if first_step and self.path.is_file():
            with self.path.open() as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first_step]
        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds a row for the state after ``step`` steps."""
        self.rows.append({"step": step, **values})
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            table = csv.DictWriter(file, names)
            table.writeheader()
            table.writerows(self.rows)
        partial.replace(self.path)


class Training:
    """A run: its state, which checkpoints hold, and its loop."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.processes = Processes()
        self.train_data, self.val_data = read_data(options.data)
        self.samples = TrainingSamples(
            self.train_data, options.mosaic, options.flip, options.seed, cache=not options.workers
        )
        self.steps_per_epoch = len(self.samples) // options.batch_size
        self.steps = options.epochs * self.steps_per_epoch
        torch.manual_seed(options.seed)
        self.config = DetectorConfig(
            options.model,
            self.train_data.classes,
            options.image_size,
            options.small,
            detector_options(options, self.train_data),
        )
        device = self.processes.device
        self.model = self.config.build().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = MovingAverage(self.model, options.ema, self.steps_per_epoch)
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, options.weight_decay), momentum=0.9, nesterov=True
        )
        self.step = 0
        self.losses: dict[str, float] = {}  # sums since the last row of the metrics
        self.wall_time = self.cpu_time = 0.0  # of earlier processes of this run
        self.file = options.run / "checkpoint.pt"
        if options.resume and self.file.is_file():
            self.load()
        elif self.file.is_file():
            raise FileExistsError(f"{self.file} is there: --resume continues it")
        self.started = time.perf_counter(), time.process_time()

    def load(self) -> None:
        """Takes over the state in the checkpoint.

        Raises:
            ValueError: it is of a run with other options.
        """
        found = checkpoint.read(self.file)
        state = found["training"]
        for name, value in self.settings().items():
            old = state["settings"][name]
            if old != value:
                raise ValueError(f"{self.file} is of a run with {name} {old!r}, not {value!r}")
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(found["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"]
        self.wall_time, self.cpu_time = state["wall_time"], state["cpu_time"]

    def save(self) -> None:
        """Writes the checkpoint, whose weights are the moving average."""
        wall_time, cpu_time = self.times()
        state = {
            "settings": self.settings(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
            "wall_time": wall_time,
            "cpu_time": cpu_time,
        }
        weights = self.average.model.state_dict()
        checkpoint.save(self.file, checkpoint.content(self.config, weights, training=state))

    def settings(self) -> dict[str, Any]:
        """The options that a run keeps to its end."""
        free = ("data", "run", "resume", "threads", "workers", "checkpoint_every", "evaluate_every")
        return {name: value for name, value in vars(self.options).items() if name not in free}

    def times(self) -> tuple[float, float]:
        """Wall and CPU seconds of the run so far, evaluation included."""
        wall, cpu = self.started
        return (
            self.wall_time + time.perf_counter() - wall,
            self.cpu_time + time.process_time() - cpu,
        )

    def run(self) -> None:
        """Trains to the end."""
        options, processes = self.options, self.processes
        is_first = processes.rank == 0
        model: nn.Module = self.model
        if processes.count > 1:
            model = DistributedDataParallel(self.model)
        metrics = Metrics(options.run, self.step) if is_first else None
        checkpoint_every = options.checkpoint_every or self.steps_per_epoch
        columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(TextColumn("{task.description}"), *columns, disable=not is_first) as progress:
            task = progress.add_task("training", total=self.steps, completed=self.step)
            for images, targets in self.batches():
                losses = self.train_step(model, images, targets)
                self.step += 1
                for name, loss in losses.items():
                    self.losses[name] = self.losses.get(name, 0.0) + loss
                progress.update(task, advance=1, description=f"loss {sum(losses.values()):.3f}")
                if metrics and self.step % self.steps_per_epoch == 0:
                    values = self.end_of_epoch()
                    metrics.add(self.step, values)
                    text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
                    progress.console.print(f"epoch {self.step // self.steps_per_epoch}  {text}")
                if is_first and self.step % checkpoint_every == 0:
                    self.save()
        if is_first:
            self.save()

    def batches(self) -> DataLoader[Any]:
        """The batches from the next step to the last."""
        options, processes = self.options, self.processes
        batches = Batches(
            len(self.samples),
            options.batch_size,
            options.seed,
            self.steps,
            self.step,
            processes.rank,
            processes.count,
        )
        return DataLoader(
            self.samples,
            batch_sampler=batches,
            num_workers=options.workers,
            collate_fn=lambda samples: tuple(zip(*samples, strict=True)),
        )

    def train_step(
        self, model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, float]:
        """One step; returns the losses of the whole batch."""
        options, device = self.options, self.processes.device
        # Random numbers depend on the step alone, so that a checkpoint need not hold their state.
        generator = seeded(options.seed, self.step, self.processes.rank)
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        self.set_mode()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, options.lr, options.warm_up)
        images = [image.to(device) for image in images]
        targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
        with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
            losses = model(images, targets)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        if not loss.isfinite():
            raise FloatingPointError(f"the loss of step {self.step} is {loss.item()}: {losses}")
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.model, self.step)
        means = self.processes.mean(torch.stack([v.detach().float() for v in losses.values()]))
        return dict(zip(losses, means.tolist(), strict=True))

    def set_mode(self) -> None:
        """Training mode, and the image size of this step."""
        options = self.options
        self.model.train()
        if options.freeze_norm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        if options.scales:
            generator = seeded(options.seed, self.step, -1)
            choice = int(torch.randint(len(options.scales), (), generator=generator))
            self.model.transform.min_size = (options.scales[choice],)

    def end_of_epoch(self) -> dict[str, float]:
        """The values of a row of the metrics; evaluates where it is time."""
        options = self.options
        values = {name: total / self.steps_per_epoch for name, total in self.losses.items()}
        self.losses = {}
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        epoch = self.step // self.steps_per_epoch
        if epoch % options.evaluate_every == 0 or self.step == self.steps:
            device = self.processes.device
            found = detections_of(self.average.model, self.val_data, options.batch_size, device)
            values.update(coco_map(self.val_data, found))
            save_picture(options.run / "predictions.png", self.val_data, found)
        values["wall_s"], values["cpu_s"] = self.times()
        return values


def read_data(folder: Path) -> tuple[CocoData, CocoData]:
    """The splits to train on and to evaluate on.

    Raises:
        ValueError: see :func:`read_coco`; or the splits have different categories.
    """
    train, val = (read_coco(folder / name, folder / f"{name}.json") for name in ("train", "val"))
    if (train.classes, train.category_ids) != (val.classes, val.category_ids):
        raise ValueError(f"{val.file} must have the categories of {train.file}")
    return train, val


def detector_options(options: argparse.Namespace, data: CocoData) -> dict[str, Any]:
    """Arguments of the detector's class: ATSS's assigner, YOLO's anchors, which fit the data."""
    if options.model == "atss":
        return {"assigner": options.assigner} if options.assigner else {}
    boxes = torch.cat(
        [e.target()["boxes"] * options.image_size / min(e.size) for e in data.entries]
    )
    if len(boxes) < 9:
        return {}  # the published anchors
    return {"anchors": fitted_anchors(boxes[:, 2:] - boxes[:, :2])}


def fitted_anchors(sizes: Tensor) -> list[list[list[float]]]:
    """Three anchors for each of YOLO's levels, clusters of the boxes that suit its stride.

    A level's cells cannot place a box that is smaller than about two of them, so that a level gets
    the boxes from twice its stride on, by the root of their area, and the finest the rest. A level
    that few boxes suit gets anchors of its neighbour's shapes, in its own scale.

    Args:
        sizes: widths and heights of boxes in pixels, [N, 2], N at least 9.
    """
    bounds = sizes.new_tensor([LEAST_CELLS * stride for stride in STRIDES[1:]])
    level_of_box = torch.bucketize(sizes.prod(1).sqrt(), bounds, right=True)
    clusters: dict[int, Tensor] = {}
    for level in range(len(STRIDES)):
        own = sizes[level_of_box == level]
        if len(own) >= 3:
            clusters[level] = cluster_box_sizes(own, 3).sizes
    anchors = []
    for level, stride in enumerate(STRIDES):
        nearest = min(clusters, key=lambda other: abs(other - level))
        anchors.append((clusters[nearest] * (stride / STRIDES[nearest])).tolist())
    return anchors


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases, norms and scales without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def learning_rate(step: int, steps: int, highest: float, warm_up: int) -> float:
    """Linear warm-up, then half a cosine down to a hundredth; steps count from 0."""
    if step < warm_up:
        return highest * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return highest * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and trains."""
    options = parsed(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.run.mkdir(parents=True, exist_ok=True)
    backend: AbstractContextManager[None] = nullcontext()
    if options.backend:
        backend = use_backend(options.backend)
    try:
        with backend:
            Training(options).run()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
