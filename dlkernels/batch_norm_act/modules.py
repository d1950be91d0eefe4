"""``nn.BatchNormAct2d``, a drop-in for ``nn.BatchNorm2d`` and the activation after it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from dlkernels.batch_norm_act.op import BatchNormActOutput, batch_norm_act
from dlkernels.batch_norm_act.reference import ACTIVATIONS, activate
from dlkernels.batch_norm_act.sync import apply_norm
from dlkernels.checks import check_choice


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm and activation (Ioffe and Szegedy 2015) in one fused op.

    Parameters, buffers, state-dict keys and running statistics are those of ``nn.BatchNorm2d``. See
    :func:`dlkernels.ops.batch_norm_act` for the formula and what is saved for backward. torch's and
    timm's ``convert_sync_batchnorm`` would drop the activation and raise RuntimeError instead; use
    :func:`dlkernels.nn.convert_sync_batchnorm`.

    Args:
        num_features: C, the channels of the input.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics; None averages all batches.
        affine: whether there are a weight and a bias.
        track_running_stats: whether there are running statistics; without them, evaluation takes
            the batch's too.
        activation: a name that :func:`dlkernels.ops.batch_norm_act` knows.
        negative_slope: of ``"leaky_relu"``.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str = "identity",
        negative_slope: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_choice("activation", activation, ACTIVATIONS)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.activation = activation
        self.negative_slope = negative_slope

    @property
    def qconfig(self) -> Any:
        """What PyTorch's quantization sets, if it did.

        Conversions to SyncBatchNorm other than the library's ask every norm for it, which is the
        one moment to tell them that they are about to drop the activation.
        """
        asking = sys._getframe(1).f_code.co_name
        if asking == "convert_sync_batchnorm" and self.activation != "identity":
            raise RuntimeError(
                f"this convert_sync_batchnorm would drop the activation {self.activation} inside "
                "BatchNormAct2d; use dlkernels.nn.convert_sync_batchnorm(model), also to finish "
                "what this call has begun"
            )
        if "qconfig" not in vars(self):
            raise AttributeError("qconfig")
        return vars(self)["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        vars(self)["qconfig"] = value

    def forward(
        self, input: Tensor, residual: Tensor | None = None, sample_scale: Tensor | None = None
    ) -> Tensor:
        """Normalises and activates maps [N, C, H, W], scales samples, adds ``residual``."""
        return self.apply_to(input, residual, sample_scale).out

    def pooled(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised and activated maps [N, C, H, W], and their mean over H and W [N, C]."""
        result = self.apply_to(input, pool=True)
        assert result.pooled is not None
        return result.out, result.pooled

    def apply_to(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        sample_scale: Tensor | None = None,
        pool: bool = False,
    ) -> BatchNormActOutput:
        """Calls the op and, in training, updates the running statistics."""
        return norm_act(
            self,
            input,
            residual,
            sample_scale,
            activation=self.activation,
            negative_slope=self.negative_slope,
            pool=pool,
        )

    def extra_repr(self) -> str:
        """The options, as ``print(module)`` shows them."""
        return f"{super().extra_repr()}, activation={self.activation}"


class SyncBatchNormAct2d(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` and an activation in plain PyTorch, on any device.

    What :func:`convert_sync_batchnorm` makes of :class:`BatchNormAct2d`; state-dict keys are the
    same.
    """

    activation: str
    negative_slope: float

    def forward(
        self, input: Tensor, residual: Tensor | None = None, sample_scale: Tensor | None = None
    ) -> Tensor:
        """As :meth:`BatchNormAct2d.forward`, with the statistics of all processes."""
        out = activate(apply_norm(self, input), self.activation, self.negative_slope)
        if sample_scale is not None:
            out = out * sample_scale[:, None, None, None].to(out.dtype)
        return out if residual is None else out + residual

    def pooled(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`BatchNormAct2d.pooled`."""
        out = self(input)
        return out, out.mean((2, 3))


def convert_sync_batchnorm(
    module: nn.Module, process_group: torch.distributed.ProcessGroup | None = None
) -> nn.Module:
    """Makes all batch norms take their statistics from all processes, activations kept.

    As ``nn.SyncBatchNorm.convert_sync_batchnorm``, which knows nothing of activations inside norms.
    Fused modules with such norms run layer by layer in plain PyTorch.

    Args:
        module: changed in place, unless it is a batch norm itself.
        process_group: the processes; None for all.

    Returns:
        The module, or what replaces it. Parameters and buffers stay the same objects.
    """
    if isinstance(module, BatchNormAct2d):
        sync = SyncBatchNormAct2d(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            process_group,
        )
        sync._parameters, sync._buffers = module._parameters, module._buffers
        sync.activation, sync.negative_slope = module.activation, module.negative_slope
        sync.training = module.training
        return sync
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for name, child in list(module.named_children()):
        setattr(module, name, convert_sync_batchnorm(child, process_group))
    return module


def norm_act(
    norm: nn.BatchNorm2d,
    input: Tensor,
    residual: Tensor | None = None,
    sample_scale: Tensor | None = None,
    **options: Any,
) -> BatchNormActOutput:
    """Calls the op with what ``norm`` holds and, in training, updates its running statistics.

    Args:
        norm: a batch norm of its own process.
        input: maps [N, C, H, W].
        residual: as in :func:`dlkernels.ops.batch_norm_act`.
        sample_scale: likewise.
        options: ``activation``, ``negative_slope`` and ``pool``, likewise.
    """
    mean, var = statistics_of(norm)
    result = batch_norm_act(
        input, norm.weight, norm.bias, mean, var, residual, sample_scale, eps=norm.eps, **options
    )
    update_running_statistics(norm, result.mean, result.var, values_per_channel(input))
    return result


def values_per_channel(maps: Tensor) -> int:
    """N * H * W of maps [N, C, H, W]."""
    return maps.shape[0] * maps.shape[2] * maps.shape[3]


def statistics_of(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics if ``norm`` is to normalise with them, else None for the batch's."""
    if norm.training or norm.running_mean is None:
        return None, None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Updates running statistics in training, as ``nn.BatchNorm2d`` does.

    All memory is taken before anything is changed, so that an error changes nothing.

    Args:
        norm: the module that holds them; nothing happens in evaluation or if it tracks none.
        mean: of the batch, [C].
        var: the biased variance of the batch, [C]; the running one is unbiased.
        count: values per channel that both were computed from; of none the running statistics
            stay as they are.
    """
    if not norm.training or norm.running_mean is None or norm.running_var is None:
        return
    batches = norm.num_batches_tracked
    factor = 0.0 if norm.momentum is None else norm.momentum
    if norm.momentum is None and batches is not None:
        factor = 1.0 / (float(batches) + 1.0)
    dtype = norm.running_mean.dtype
    mean, var = mean.to(dtype), (var * (count / max(1, count - 1))).to(dtype)
    if batches is not None:
        batches.add_(1)
    if count > 0:
        norm.running_mean.lerp_(mean, factor)
        norm.running_var.lerp_(var, factor)
