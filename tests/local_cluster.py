"""A Ray cluster of several nodes on this machine, in a separate process, with its job server and a token.

    with LocalCluster(nodes=3) as cluster:
        cluster.notbugs("submit", "experiment.yaml", "--store", store, cwd=folder)

Run as a script, this module is that process. It reads commands from standard input and ends when that closes, so it
never outlives a test session.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from support import command

MEMORY = 120 * 2**20
"""Bytes of each node's object store."""


class LocalCluster:
    """A head and other nodes, with one CPU each.

    Args:
        nodes: number of nodes, including the head.
        variables: environment variables of all its processes, such as the keys of a store.
    """

    def __init__(self, nodes: int = 3, variables: dict[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nb-"))  # short: it holds sockets
        (self.folder / "ray").mkdir()
        (self.folder / "token").write_text("a-token-of-the-tests-" + "0" * 16)
        self.environment = os.environ | (variables or {})
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{self.environment['PATH']}"
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        # Ray looks here for the cluster's address, on behalf of a job: in /tmp/ray it might find another cluster's.
        self.environment["RAY_TMPDIR"] = str(self.folder)
        self.environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's switch for: stay on the loopback
        self.environment.pop("RAY_ADDRESS", None)
        with (self.folder / "stderr").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(nodes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
                cwd=self.folder,  # not where the project lies: a job has to bring it along
                start_new_session=True,
            )
        self.address: str = self._hear()["address"]

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            everything = psutil.Process(self.process.pid).children(recursive=True)
            assert self.process.stdin is not None
            self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
            for process in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def notbugs(
        self, *args: Any, cwd: Path, timeout: float = 300, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command as a user of the cluster, with its address and token in the environment."""
        return subprocess.run(
            [command(), *map(str, args)],
            cwd=cwd,
            env=self.environment | {"RAY_API_SERVER_ADDRESS": self.address} | variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def kill_node(self) -> None:
        """Kill (SIGKILL) all processes of the newest node except the head."""
        self._order("kill")

    def add_node(self) -> None:
        """Start one more node."""
        self._order("add")

    def processes(self) -> list[psutil.Process]:
        """Every process of the cluster."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def _order(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (self.folder / "stderr").read_text()
        return dict(json.loads(line))


def free_port() -> int:
    """A loopback port on which nothing listens.

    It lies between those of Ray's workers and those that the system gives to whoever asks for any: another process was
    once given such a port before it was used here, and the cluster took no jobs.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def main(nodes: int) -> None:
    """Run the cluster."""
    from ray.cluster_utils import Cluster

    said, sys.stdout = sys.stdout, sys.stderr  # Ray prints

    def say(**facts: Any) -> None:
        print(json.dumps(facts), file=said, flush=True)

    def resources() -> dict[str, Any]:
        node = {"num_cpus": 1, "object_store_memory": MEMORY, "node_ip_address": "127.0.0.1"}
        # Ray's own is one port of the machine; where another cluster has it, no job is taken on.
        return node | {"dashboard_agent_listen_port": free_port()}

    def add() -> Any:
        # A folder of its own, as on a machine of its own: in a common one, a node that sets up a job's working
        # folder removes it first, also where the job's processes on another node are in it.
        return cluster.add_node(**resources(), temp_dir=tempfile.mkdtemp(dir=os.environ["RAY_TMPDIR"]))

    def kill(node: Any) -> None:
        # A worker outlives its raylet for as long as it takes to notice, and may still give back what it made.
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        workers = raylet.children(recursive=True)
        cluster.remove_node(node, allow_graceful=False)
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()

    head = resources() | {
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": free_port(),
    }
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
    others = [add() for _ in range(nodes - 1)]
    say(address=f"http://{cluster.webui_url}")
    for line in sys.stdin:
        if line.strip() == "kill":
            kill(others.pop())
        elif line.strip() == "add":
            others.append(add())
        say(nodes=1 + len(others))
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
