"""The device: its name, memory, rate of matrix products, and bandwidth of copies."""

import platform
import shutil
import subprocess

import torch

from benchmarks.gpu.sheet import Sheet, seconds_of
from stages.device import computing, device, kind
from stages.recipes import Compute

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}


def measure(sheet: Sheet) -> None:
    where, add = device(), sheet.table("The device", "what", "value")
    add("kind", kind())
    if where.type == "cuda":
        facts = torch.cuda.get_device_properties(0)
        add("memory, GiB", f"{facts.total_memory / 2**30:.1f}")
        add("multiprocessors", str(facts.multi_processor_count))
        add("driver", _driver())
    add("Python, torch, CUDA, cuDNN", f"{platform.python_version()}, {torch.__version__}, {torch.version.cuda}, "
        f"{torch.backends.cudnn.version()}")  # fmt: skip
    size, rounds = (256, 2) if sheet.tiny else (8192, 10)
    for precision, dtype in DTYPES.items():
        a, b = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
        with computing(Compute(precision=precision)):  # type: ignore[arg-type]
            for _ in range(3):
                a @ b
            rate = 2 * size**3 * rounds / seconds_of(lambda a=a, b=b: [a @ b for _ in range(rounds)])
        add(f"matrix product, {precision}, TFLOP/s", f"{rate / 1e12:,.1f}")
        sheet.note(precision, rate)
    count = 2**20 if sheet.tiny else 2**30
    source, target = torch.zeros(2, count, dtype=torch.uint8, device=where)
    host = torch.zeros(count, dtype=torch.uint8)
    for what, work, moved in (
        ("on the device", lambda: target.copy_(source), 2 * count),
        ("from pageable memory", lambda: target.copy_(host), count),
        ("from pinned memory", None, count),
    ):
        if work is None:
            if where.type != "cuda":
                continue
            pinned = host.pin_memory()
            work = lambda pinned=pinned: target.copy_(pinned, non_blocking=True)  # noqa: E731
        work()
        add(f"copy {what}, GB/s", f"{moved / seconds_of(work, 3) / 1e9:,.1f}")


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip().splitlines()[0]
