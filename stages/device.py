"""What a process computes on, with which numbers and which kernels: set here and nowhere else.

PyTorch's own defaults on a GPU are others: convolutions in TF32, and kernels that add up in whatever order they finish.
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

# cuBLAS reads it once, with its first product, and is deterministic only with a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def device() -> torch.device:
    """The GPU that this process was given, if any, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kind() -> str:
    """What kind of device this process computes on: one kind gives one recipe the same bytes, two may not.

    Of a GPU its name and compute capability, of a processor the instructions that its kernels are chosen by.
    """
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()}, {major}.{minor}"
    bits = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    extra = [name for name in ("amx_bf16", "avx512_bf16") if bits.get(name)][:1]
    return ", ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *extra])


@contextmanager
def computing(recipe: Compute | Train | Evaluate) -> Iterator[None]:
    """Compute as a recipe says: its CPU threads (one where it names none), its precision, deterministic kernels.

    The precision is that of backward passes; a forward pass is in that of the model, whatever is said here.
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
    """Collects the settings of each `computing` entered meanwhile, read back from PyTorch: see `settings_text`."""
    seen: set[str] = set()
    token = _witnesses.set((*_witnesses.get(), seen))
    try:
        yield seen
    finally:
        _witnesses.reset(token)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with this many CPU threads: another number rounds differently, so it is never left to chance."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def numbers(precision: Precision) -> Iterator[None]:
    """Round what goes into products of float32 to TF32, on a GPU and for that precision; for no other."""
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
    # By the older of PyTorch's two interfaces: after the newer one the older raises where a library asks it.
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]  # a user's module may have asked for another
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision("high" if products else "highest")
    if _tf32() != (convolutions, products):
        raise RuntimeError(f"PyTorch {torch.__version__} did not take its precision of float32: {_tf32()}")


@contextmanager
def _kernels(deterministic: bool) -> Iterator[None]:
    """Kernels that give the same bits every time, or the fastest of them."""
    cudnn, filled = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, filled.fill_uninitialized_memory
    torch.use_deterministic_algorithms(deterministic)
    # Trying kernels out takes the one that happened to be fastest; filling memory finds bugs that are not ours.
    cudnn.deterministic, cudnn.benchmark, filled.fill_uninitialized_memory = deterministic, not deterministic, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, filled.fill_uninitialized_memory = flags


def sent(values: np.ndarray, where: torch.device | None = None) -> torch.Tensor:
    """An array on a device; to a GPU it is copied by the way, out of memory that the copy may take its time with."""
    return on(torch.from_numpy(np.require(values, requirements=["C", "W"])), where)


def on(values: torch.Tensor, where: torch.device | None) -> torch.Tensor:
    """The same of a tensor."""
    if where is None or where.type != "cuda" or values.is_cuda:
        return values.to(where)
    return values.pin_memory().to(where, non_blocking=True)


def settings_text() -> str:
    """The current settings as text, for commit marks, metrics and manifests."""
    now = settings()
    return f"{'tf32' if now['tf32'] else 'float32'}, {'deterministic' if now['deterministic'] else 'fastest'} kernels"


def settings() -> dict[str, bool]:
    """What is set now: whether float32 is TF32 anywhere, and whether all kernels are deterministic."""
    cudnn = torch.backends.cudnn
    exact = torch.are_deterministic_algorithms_enabled() and cudnn.deterministic and not cudnn.benchmark
    return {"tf32": any(_tf32()), "deterministic": exact}


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def tune_malloc() -> None:
    """Make glibc keep freed memory: each step asks for the same blocks again, and the kernel zeroes fresh pages."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
