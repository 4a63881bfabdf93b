"""Shared by the tests besides fixtures: a small experiment on real digits, and access to a local store."""

import contextlib
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.store import Store

TINY: dict[str, Any] = {
    "name": "tiny",
    "datasets": {
        "clean": {"load": {"source": "sklearn-digits", "shard_size": 64, "limit": 192}},
        "other": {
            "attack": {"images": "clean", "model": "standard", "eps": 1.5, "steps": 3, "batch_size": 32},
            "relabel": "other",
        },
        "control": {"attack": {"images": "clean", "method": "none"}, "relabel": "other"},
    },
    "models": {
        "standard": {"train": {"on": "clean", "arch": "small_cnn", "epochs": 2, "batch_size": 32, "threads": 1}},
        "from_other": {"train": {"on": "other", "arch": "small_cnn", "epochs": 2, "batch_size": 32, "threads": 1}},
    },
    "evaluations": {"accuracy": {"models": ["standard", "from_other"], "on": "clean", "split": "test"}},
}
"""Three shards of 64 training images, three of test images, in a few seconds."""


def command() -> str:
    """The console script of this environment."""
    return str(Path(sys.executable).with_name("notbugs"))


def contents(store: Path) -> dict[str, str]:
    """Node → content digest, for all finished nodes of a local store."""
    found = {}
    for manifest in sorted(store.glob("*/*/*/manifest.json")):
        facts = json.loads(manifest.read_text())
        found[f"{facts['group']}/{facts['name']}"] = facts["content"]
    return found


def files(folder: Path) -> set[str]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def reseal(store: Path, path: Path, change: Callable[[Any], Any]) -> None:
    """Change a document of a local store and seal it again."""
    name = path.relative_to(store).as_posix()
    value = Store(str(store)).find_json(name)
    assert value is not None
    changed = change(value)
    Store(str(store)).put_json(name, value if changed is None else changed)


class Peak:
    """Peak memory of the process in bytes, above its memory at the start, while this is open; 0 if it is unknown."""

    bytes = 0

    def __enter__(self) -> "Peak":
        self.before = self._read("VmRSS")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = max(0, self._read("VmHWM") - self.before)

    @staticmethod
    def _read(key: str) -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return 0
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def tar_of(*named: tuple[str, bytes]) -> bytes:
    """A tar with these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in named:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def holds(state: Any, weights: bytes) -> bool:
    """Whether safetensors hold the tensors of a state dict, and no others."""
    import safetensors.torch
    import torch

    found = safetensors.torch.load(weights)
    return set(found) == set(state) and all(torch.equal(found[name], state[name]) for name in state)
