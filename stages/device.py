"""A process's device, float32 precision and kernels, set here and nowhere else.

PyTorch's defaults on a GPU differ: convolutions in TF32, and kernels that add in the order in which threads finish.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, cast

import numpy as np
import torch

from stages.recipes import Compute, Evaluate, Precision, Train

# cuBLAS reads this once, at its first product, and is deterministic only with a workspace of fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def device() -> torch.device:
    """The GPU assigned to this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kind() -> str:
    """This process's kind of device: devices of one kind give the same bytes, others may not.

    For a GPU, its name and compute capability; for a CPU, the instruction sets that select its kernels.
    """
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()}, {major}.{minor}"
    bits = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    extra = [name for name in ("amx_bf16", "avx512_bf16") if bits.get(name)][:1]
    return ", ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *extra])


@contextmanager
def computing(recipe: Compute | Train | Evaluate) -> Iterator[None]:
    """Apply a recipe's CPU threads (default one), precision and deterministic kernels; restore the old ones at the end.

    The precision applies to backward passes; a forward pass runs in the model's own.
    """
    with ExitStack() as stack:
        stack.enter_context(threads(getattr(recipe, "threads", 1)))
        stack.enter_context(numbers(getattr(recipe, "precision", "float32")))
        stack.enter_context(_kernels(recipe.deterministic))
        for seen in _witnesses.get():
            seen.add(settings_text())
        yield


_witnesses: ContextVar[tuple[set[str], ...]] = ContextVar("witnesses", default=())


@contextmanager
def witnessed() -> Iterator[set[str]]:
    """Collect the settings of each `computing` inside, as read back from PyTorch: see `settings_text`."""
    seen: set[str] = set()
    token = _witnesses.set((*_witnesses.get(), seen))
    try:
        yield seen
    finally:
        _witnesses.reset(token)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with this many CPU threads. The number is always set, since it changes the rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def numbers(precision: Precision) -> Iterator[None]:
    """Round the inputs of float32 products to TF32 for precision `tf32`, which affects GPUs only; else keep float32."""
    before, wanted = _tf32(), (precision == "tf32",) * 2
    if before != wanted:
        _set_tf32(*wanted)
    try:
        yield
    finally:
        if before != wanted:
            _set_tf32(*before)


def _tf32() -> tuple[bool, bool]:
    """Whether convolutions and whether matrix products use TF32."""
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return convolutions.fp32_precision == "tf32", products.fp32_precision == "tf32"


def _set_tf32(convolutions: bool, products: bool) -> None:
    # PyTorch's older interface: after use of the newer one, the older raises when a library reads it.
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]  # a user's module may have changed it
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision("high" if products else "highest")
    if _tf32() != (convolutions, products):
        raise RuntimeError(f"PyTorch {torch.__version__} did not take its precision of float32: {_tf32()}")


@contextmanager
def _kernels(deterministic: bool) -> Iterator[None]:
    """Use deterministic kernels, or the fastest ones."""
    cudnn, filled = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, filled.fill_uninitialized_memory
    torch.use_deterministic_algorithms(deterministic)
    # `benchmark` picks whichever kernel ran fastest; filling memory only helps to find uninitialised reads.
    cudnn.deterministic, cudnn.benchmark, filled.fill_uninitialized_memory = deterministic, not deterministic, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, filled.fill_uninitialized_memory = flags


def sent(values: np.ndarray, where: torch.device | None = None) -> torch.Tensor:
    """An array as a tensor on a device; a copy to a GPU is asynchronous, from pinned memory."""
    return on(torch.from_numpy(np.require(values, requirements=["C", "W"])), where)


def on(values: torch.Tensor, where: torch.device | None) -> torch.Tensor:
    """The same for a tensor."""
    if where is None or where.type != "cuda" or values.is_cuda:
        return values.to(where)
    return values.pin_memory().to(where, non_blocking=True)


def settings_text() -> str:
    """The current settings as text, for commit marks, metrics and manifests."""
    now = settings()
    return f"{'tf32' if now['tf32'] else 'float32'}, {'deterministic' if now['deterministic'] else 'fastest'} kernels"


def settings() -> dict[str, bool]:
    """The current settings: whether TF32 is used anywhere, and whether kernels are deterministic."""
    cudnn = torch.backends.cudnn
    exact = torch.are_deterministic_algorithms_enabled() and cudnn.deterministic and not cudnn.benchmark
    return {"tf32": any(_tf32()), "deterministic": exact}


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def tune_malloc() -> None:
    """Make glibc keep freed memory: each step allocates the same blocks again, and the kernel must zero fresh pages."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
