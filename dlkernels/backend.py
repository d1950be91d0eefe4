"""Which implementation serves which op, and why.

An op has up to four implementations, called backends:

* ``cpp``: the C++ kernels for CPU tensors (libdlkernels_cpu.so);
* ``cuda``: the compiled CUDA kernels (libdlkernels_cuda.so);
* ``triton``: the Triton kernels for CUDA tensors; with ``TRITON_INTERPRET=1`` in the environment
  the Triton interpreter runs them on CPU tensors, in place of the C++ kernels, for tests;
* ``reference``: the plain PyTorch formula. It serves float64 tensors, devices without kernels,
  exports, and installs without compiled parts.

The choice follows the tensor's device and what is built. ``use_backend`` or the environment
variable ``DLKERNELS_BACKEND`` force it; a forced backend that cannot serve raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("cpp", "cuda", "triton", "reference")

# The oldest torch: the compiled parts are on its stable ABI.
MINIMUM_TORCH = (2, 13)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_LIBRARY = torch.library.Library("dlkernels", "FRAGMENT")
_CUDA_LIBRARY = torch.library.Library("dlkernels_cuda", "FRAGMENT")


@dataclass(frozen=True)
class _Op:
    """An op of the library.

    Attributes:
        name: without its namespace.
        triton_module: where its Triton launcher stands, if it has one.
        missing: for each backend the reason why it is not there, or None if it is.
    """

    name: str
    triton_module: str | None
    missing: dict[str, str | None]

    def launcher(self) -> Callable[..., Any]:
        """The Triton launcher; its module is imported at the first use."""
        assert self.triton_module is not None
        return getattr(importlib.import_module(self.triton_module), self.name)


_ops: dict[str, _Op] = {}


# ---- loading ------------------------------------------------------------------------------------


def _load_info() -> ModuleType | None:
    try:
        return importlib.import_module("dlkernels._info")
    except ImportError:
        return None


def _check_torch() -> None:
    installed = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if installed < MINIMUM_TORCH:
        needed = f"torch>={'.'.join(map(str, MINIMUM_TORCH))}"
        raise ImportError(
            f"dlkernels needs {needed}, but torch {torch.__version__} is installed. "
            f"Upgrade torch (pip install --upgrade '{needed}')."
        )


def _load(stem: str) -> str | None:
    """Loads a library of the package; returns the reason when it is not there."""
    path = Path(__file__).parent / f"lib{stem}.so"
    if not path.is_file():
        return f"{path.name} is not part of this install"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        built_for = info.torch_version if info else "an unknown torch"
        raise ImportError(
            f"{path.name} was built for torch {built_for} and does not load under torch "
            f"{torch.__version__}: {error.__cause__ or error}. Build dlkernels again in this "
            "environment (pip install --force-reinstall --no-deps dlkernels)."
        ) from error
    return None


def _why_no_compiled_parts() -> str:
    package = Path(__file__).parent
    try:
        return str(importlib.import_module("dlkernels._not_compiled").REASON)
    except ImportError:
        pass
    if (package.parent / "csrc").is_dir():
        return (
            f"dlkernels is imported from its source tree {package.parent}, which is not built for "
            "this Python; start Python elsewhere to use an installed dlkernels, or build here with "
            "`python setup.py build_ext --inplace`"
        )
    return "this install holds no compiled parts for this Python"


def _load_cpu() -> str | None:
    if INTERPRETED:
        return "TRITON_INTERPRET=1: the Triton interpreter serves CPU tensors in this process"
    if info is None:
        return _why_no_compiled_parts()
    return _load("dlkernels_cpu")


def _load_cuda() -> str | None:
    if info is None:
        return _why_no_compiled_parts()
    if not info.cuda_version:
        return f"this build has no CUDA kernels: {info.no_cuda_reason}"
    major = info.cuda_version.split(".")[0]
    if torch.version.cuda is None:
        return (
            f"built for CUDA {info.cuda_version}, but torch {torch.__version__} is a CPU build; "
            f"for GPUs install a torch built for CUDA {major}"
        )
    if torch.version.cuda.split(".")[0] != major:
        return (
            f"built for CUDA {info.cuda_version}, but torch {torch.__version__} uses CUDA "
            f"{torch.version.cuda}; install the dlkernels built for CUDA {torch.version.cuda}, "
            f"or a torch built for CUDA {major}"
        )
    return _load("dlkernels_cuda")


def _find_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


_check_torch()
info = _load_info()

_NO_DEVICE = "built, but no CUDA device was found"

_missing: dict[str, str | None] = {
    "cpp": _load_cpu(),
    "cuda": _load_cuda(),
    "triton": _find_triton(),
    "reference": None,
}
if _missing["cuda"] is None and not torch.cuda.is_available():
    _missing["cuda"] = _NO_DEVICE


# ---- choosing -----------------------------------------------------------------------------------


def _checked(backend: str | None, source: str) -> str | None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, but is {backend!r}")
    return backend


_forced: str | None = _checked(os.environ.get("DLKERNELS_BACKEND") or None, "DLKERNELS_BACKEND")
_warned = False


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Serves every op from one backend inside the ``with`` block, in the whole process.

    Args:
        backend: ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: no such backend.
        RuntimeError: from an op that the backend cannot serve; the message says why.
    """
    global _forced
    previous = _forced
    _forced = _checked(backend, "backend")
    try:
        yield
    finally:
        _forced = previous


def _reason_against(backend: str, op: _Op, device: str) -> str | None:
    """Why the backend cannot serve the op on the device, or None if it can."""
    reason = op.missing[backend]
    if reason is None and backend != "reference" and device != _device_of(backend):
        return f"it serves {_device_of(backend)} tensors, not {device}"
    return reason


def _device_of(backend: str) -> str:
    return "cpu" if backend == "cpp" or (backend == "triton" and INTERPRETED) else "cuda"


def availability() -> dict[str, dict[str, str]]:
    """For each op, for each backend: ``"available"``, or the reason why it is not."""
    table: dict[str, dict[str, str]] = {}
    for op in _ops.values():
        table[op.name] = {name: op.missing[name] or "available" for name in BACKENDS}
    return table


def select(name: str, tensor: torch.Tensor) -> str:
    """The backend that serves the op ``name`` for a tensor; public functions ask this first."""
    if tensor.dtype == torch.float64 or torch.compiler.is_exporting() or _in_onnx_export():
        return "reference"
    return _select(name, tensor.device.type)


def has_kernel(name: str, tensor: torch.Tensor) -> bool:
    """Whether a kernel serves the op ``name`` for a tensor; the plain formula does otherwise.

    Unlike :func:`select` it neither raises where a forced backend cannot serve the op nor warns:
    for ops that callers have another way around.
    """
    if tensor.dtype == torch.float64 or torch.compiler.is_exporting() or _in_onnx_export():
        return False
    backends = BACKENDS if _forced is None else (_forced,)
    op, device = _ops[name], tensor.device.type
    kernels = [backend for backend in backends if backend != "reference"]
    return any(_reason_against(backend, op, device) is None for backend in kernels)


def _in_onnx_export() -> bool:
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()


def _select(name: str, device: str) -> str:
    op = _ops[name]
    if _forced is not None:
        reason = _reason_against(_forced, op, device)
        if reason is not None:
            raise RuntimeError(f"backend {_forced!r} cannot serve dlkernels::{name}: {reason}")
        return _forced
    for backend in BACKENDS:
        if _reason_against(backend, op, device) is None:
            if backend == "reference" and device in ("cpu", "cuda"):
                _warn_once(device)
            return backend
    raise AssertionError("the reference serves everything")


def _warn_once(device: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        backend = "cpp" if device == "cpu" else "cuda"
        warnings.warn(
            f"dlkernels runs its plain PyTorch formulas on {device} tensors: {_missing[backend]}. "
            "Run `python -m dlkernels info` for details.",
            stacklevel=4,
        )


# ---- registration -------------------------------------------------------------------------------


def define(
    name: str, signature: str, fake: Callable[..., Any], triton_module: str | None = None
) -> Callable[..., Any]:
    """Defines ``dlkernels::<name>`` and connects it with its kernels.

    C++ registers the CPU kernel for ``dlkernels::<name>`` and the compiled CUDA kernel for
    ``dlkernels_cuda::<name>``, which has the same signature; the CUDA kernel of
    ``dlkernels::<name>`` chooses between that and the launcher ``<name>`` of ``triton_module``.

    Args:
        name: the op's name without its namespace.
        signature: arguments and results in the schema language, ``"(Tensor x) -> Tensor"``.
        fake: computes results without data, for tracing.
        triton_module: the module of the Triton launcher, imported at its first use.

    Returns:
        The op's default overload.
    """
    _LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    _CUDA_LIBRARY.define(name + signature)
    torch.library.register_fake(f"dlkernels::{name}", fake, lib=_LIBRARY)
    op = _ops[name] = _Op(name, triton_module, _missing_kernels(name, triton_module))

    def kernel(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        if _select(name, device) == "cuda":
            return getattr(torch.ops.dlkernels_cuda, name)(*args)
        return op.launcher()(*args)

    _LIBRARY.impl(name, kernel, "CPU" if INTERPRETED else "CUDA")
    return getattr(torch.ops.dlkernels, name).default


def _missing_kernels(name: str, triton_module: str | None) -> dict[str, str | None]:
    def registered(namespace: str, key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)

    has_kernel = {
        "cpp": registered("dlkernels", "CPU"),
        "cuda": registered("dlkernels_cuda", "CUDA"),
        "triton": triton_module is not None,
        "reference": True,
    }

    def reason(backend: str) -> str | None:
        is_known = _missing[backend] in (None, _NO_DEVICE) or backend == "triton"
        if is_known and not has_kernel[backend]:
            return "the op has no such kernel"
        return _missing[backend]

    return {backend: reason(backend) for backend in BACKENDS}


def register_autocast(name: str, arguments: Collection[str] | None = None) -> None:
    """Under autocast the op casts its floating-point tensors to the autocast dtype.

    Accumulation inside the kernels stays in float32.

    Args:
        name: the op's name without its namespace.
        arguments: the names of those that are cast; None for all.
    """
    op = getattr(torch.ops.dlkernels, name).default
    names = [argument.name for argument in op._schema.arguments]
    casts = [arguments is None or name in arguments for name in names]
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _LIBRARY.impl(name, _autocast_kernel(op, casts, device, key), key)


def _autocast_kernel(
    op: Callable[..., Any], casts: Sequence[bool], device: str, key: str
) -> Callable[..., Any]:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(arg: Any, dtype: torch.dtype) -> Any:
        if isinstance(arg, (list, tuple)):
            return [cast(item, dtype) for item in arg]
        if not isinstance(arg, torch.Tensor) or not arg.is_floating_point():
            return arg
        return arg if arg.dtype == torch.float64 else arg.to(dtype)

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        # Defaults at the end may be left out.
        pairs = zip(args, casts, strict=False)
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return op(*(cast(arg, dtype) if wanted else arg for arg, wanted in pairs))

    return kernel


def refuse_double_backward(name: str) -> None:
    """Makes differentiating a backward op an error instead of a silent zero."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"dlkernels::{name} cannot be differentiated again; compute second derivatives under "
            'dlkernels.use_backend("reference")'
        )

    torch.library.register_autograd(f"dlkernels::{name}", backward, lib=_LIBRARY)


def register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Connects the op with its gradient formula."""
    torch.library.register_autograd(
        f"dlkernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )
