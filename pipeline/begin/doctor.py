"""Whether this machine is ready for a run, and what to do where it is not."""

import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from pipeline.run.engines import reason_of
from pipeline.store import Store
from stages.errors import BadInput
from stages.prefetch import cores

GIB = 2**30

LEAST_DISK, LEAST_SHARED = 10 * GIB, 2 * GIB
"""Free bytes below which a line warns: a hundred thousand photographs; three shards in flight of a few workers."""

PORTS = {6379: "Ray's head", 8265: "Ray's dashboard"}

State = Literal["good", "attention", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        what: what was looked at.
        state: good, attention (a run may still do), or broken (mend it first).
        found: what was found.
        remedy: what to do; empty where nothing has to be done, or where what was found says it.
    """

    what: str
    state: State
    found: str
    remedy: str = ""


def examine(store: str, data: Path, address: str | None) -> Iterator[Finding]:
    """Look at everything that a run needs, one after the other; a check that fails is a finding itself.

    Args:
        store: folder or URL of the store.
        data: folder of local sources.
        address: a Ray cluster; by default Ray is only looked at, not started.
    """
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("packages", _packages),
        ("device", _device),
        ("ray", lambda: _ray(address)),
        ("store", lambda: _store(store)),
        ("data", lambda: _data(data)),
        ("disk", lambda: _disk(store)),
        ("temporary folder", _temporary),
        ("shared memory", _shared),
        ("ports", _ports),
    ]
    for what, check in checks:
        try:
            yield check()
        except (BadInput, ImportError, OSError, RuntimeError, ValueError) as error:
            yield Finding(what, "broken", reason_of(error))


def _python() -> Finding:
    wanted, here = metadata.metadata("notbugs")["Requires-Python"], platform.python_version()
    if here in SpecifierSet(wanted):
        return Finding("python", "good", here)
    return Finding("python", "broken", f"{here}, expected {wanted}", "make a virtual environment with such a Python")


def _packages() -> Finding:
    """The required packages and their versions."""
    wrong, there = list[str](), list[str]()
    for line in metadata.requires("notbugs") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        there.append(f"{wanted.name} {version}")
        if not wanted.specifier.contains(Version(version).base_version, prereleases=True):
            wrong.append(f"{wanted.name} {version}, expected {wanted.specifier}")
    if wrong:
        return Finding("packages", "broken", "; ".join(wrong), "install them: pip install -U notbugs")
    shown = [one for one in there if one.partition(" ")[0] in ("torch", "torchvision", "ray", "pyarrow")]
    return Finding("packages", "good", ", ".join(shown))


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        free, whole = torch.cuda.mem_get_info(0)
        found = f"{count} × {torch.cuda.get_device_name(0)}, {free / GIB:.0f} of {whole / GIB:.0f} GiB free"
        if free < whole / 2:
            return Finding("device", "attention", found, "end what else uses it (nvidia-smi lists it)")
        return Finding("device", "good", found)
    if shutil.which("nvidia-smi"):
        return Finding(
            "device",
            "broken",
            f"PyTorch {torch.__version__} uses none of this machine's GPUs",
            "install a PyTorch for the driver's CUDA (nvidia-smi prints its version); see pytorch.org",
        )
    return Finding("device", "good", f"no GPU, {cores()} CPU cores")


def _ray(address: str | None) -> Finding:
    import ray

    if address is None:
        folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
        if len(folder) > LONGEST_FOLDER:
            return Finding(
                "ray", "broken", f"its folder {folder} is too long for sockets", "set RAY_TMPDIR to a short path"
            )
        return Finding("ray", "good", f"{ray.__version__}; a run starts it on this machine")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return Finding("ray", "broken", f"{address} is no address", "name host:6379, the head of the cluster")
    try:
        with closing(socket.create_connection((host.strip("[]"), int(port)), timeout=5)):
            return Finding("ray", "good", f"{ray.__version__}; {address} answers")
    except (OSError, OverflowError) as error:
        return Finding("ray", "broken", f"{address}: {error}", "start the cluster, or open the tunnel to it")


LONGEST_FOLDER = 40
"""Characters of a folder to which Ray adds the names of its sockets, which may have 107 in all."""


def _store(url: str) -> Finding:
    store, began = Store(url), time.monotonic()
    store.refuse_unless_writable()
    return Finding("store", "good", f"{store.url}: reachable and writable, in {time.monotonic() - began:.2f} s")


def _data(data: Path) -> Finding:
    if data.is_dir():
        return Finding("data", "good", str(data))
    return Finding("data", "good", f"{data} is made for downloads, once there are any")


def _free(what: str, folder: Path, least: int, remedy: str) -> Finding:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    return Finding(what, "good", found) if free >= least else Finding(what, "attention", found, remedy)


def _disk(url: str) -> Finding:
    store = Store(url)
    place = Path(store.url.removeprefix("file://")) if store.local else Path.cwd()
    return _free("disk", place, LEAST_DISK, "free some space, or name another place with --store")


def _temporary() -> Finding:
    return _free("temporary folder", Path(tempfile.gettempdir()), LEAST_SHARED, "free some space, or set TMPDIR")


def _shared() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "good", "Ray uses the temporary folder: this system has no /dev/shm")
    return _free(
        "shared memory", folder, LEAST_SHARED, "start the container with --shm-size=8g, or use --engine inline"
    )


def _ports() -> Finding:
    """Ray on this machine takes free ports by itself; a cluster's head needs its own."""
    taken = [f"{port} ({what})" for port, what in PORTS.items() if not _is_free(port)]
    if not taken:
        return Finding("ports", "good", f"{', '.join(map(str, PORTS))} are free")
    return Finding(
        "ports",
        "attention",
        f"{', '.join(taken)} in use",
        "if that is no cluster of yours, give `ray start` other ports",
    )


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
