"""Proof that a module whose type says nothing computes what a fused one does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

LARGEST_ERROR = 1e-9  # relative, in float64, where the fused modules run their plain formula


def difference_from(
    module: nn.Module, fuse: Callable[[nn.Module], nn.Module], inputs: Sequence[Sequence[Tensor]]
) -> str | None:
    """Why the module is not proven to compute what ``fuse`` makes of it, or None if it is.

    The module's forward must be traceable by ``torch.fx``, so that it has no branches on data, and
    copies in float64 with random parameters must agree, in evaluation and in training: outputs,
    gradients of inputs and parameters, and buffers. Neither the module nor the state of random
    numbers changes.

    Args:
        module: left as it is.
        fuse: makes the fused module around the layers of its argument.
        inputs: the arguments of each call, of several sizes.
    """
    try:
        exact = copy.deepcopy(module).cpu().double()
        _randomise(exact)
        fused = fuse(copy.deepcopy(exact))
        for training in (False, True):
            if _branches_on_data(exact.train(training)):
                return "its forward cannot be traced, so that branches on data cannot be excluded"
            fused.train(training)
            for arguments in inputs:
                if not _agree(exact, fused, [argument.double() for argument in arguments]):
                    return "it does not compute the formula, as a random input shows"
    except Exception as error:  # whatever the unknown module does with the random input
        return f"it cannot be run on a random input ({type(error).__name__}: {error})"
    return None


def random_maps(*shapes: Sequence[int]) -> list[Tensor]:
    """Standard normal values of each shape, from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def _branches_on_data(module: nn.Module) -> bool:
    try:
        fx.Tracer().trace(module)
    except Exception:  # fx raises many types
        return True
    return False


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        fan_in = max(1, parameter[0].numel())
        parameter.normal_(generator=generator).mul_(fan_in**-0.5)
        parameter.requires_grad_()
    for buffer in module.buffers():
        if buffer.is_floating_point():  # running means and variances
            buffer.uniform_(0.5, 1.5, generator=generator)


def _agree(exact: nn.Module, fused: nn.Module, inputs: list[Tensor]) -> bool:
    expected, actual = _results(exact, inputs), _results(fused, inputs)
    return expected.keys() == actual.keys() and all(
        value.shape == actual[name].shape
        and (value - actual[name]).norm() <= LARGEST_ERROR * (1 + value.norm())
        for name, value in expected.items()
    )


def _results(module: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of one call."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    names, parameters = zip(*module.named_parameters(), strict=True)
    # Clones, since an activation may work in place.
    outputs = _pytree.tree_leaves(module(*(leaf * 1 for leaf in leaves)))
    total = sum((output * random_maps(output.shape)[0].double()).sum() for output in outputs)
    grads = torch.autograd.grad(total, [*leaves, *parameters], allow_unused=True)
    grad_names = [*(f"input {index}" for index in range(len(leaves))), *names]
    results = {f"output {index}": output for index, output in enumerate(outputs)}
    results |= {
        f"grad of {name}": torch.zeros(1) if grad is None else grad
        for name, grad in zip(grad_names, grads, strict=True)
    }
    results |= {name: buffer.double() * 1 for name, buffer in module.named_buffers()}
    return results
