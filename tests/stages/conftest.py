"""Shared by the tests of the stages: real digits, a network trained on them, a place for a user's modules."""

import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import FunctionType
from uuid import uuid4

import numpy as np
import pytest
import torch

from stages import nets, train
from stages.load import assign_to_shards, list_source, read
from stages.model import Classifier, Design, load
from stages.recipes import Digits, Train
from stages.shard import Shard
from stages.tensors import channel_statistics


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One CPU thread for the tests' own computations: the same bits on every machine, and little load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """The same weights in a test, whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> dict[str, Shard]:
    """scikit-learn's digits, one shard per split."""
    recipe = Digits(source="sklearn-digits", shard_size=2000)
    listing = list_source(recipe, Path())
    shards = {name: read(recipe, name, items, 1, None) for name, items in assign_to_shards(listing, recipe).items()}
    return {shard.split: shard for shard in shards.values()}


@pytest.fixture(scope="session")
def design(digits: dict[str, Shard]) -> Design:
    """A small_cnn for the digits, normalised with their own statistics."""
    values = digits["train"].images().astype(np.float64)
    mean, std = channel_statistics([float(values.sum())], [float((values**2).sum())], values.size)
    return Design("small_cnn", 10, (1, 8, 8), tuple(mean), tuple(std))


@pytest.fixture(scope="session")
def examples_of() -> Callable[..., train.Examples]:
    """Training examples from a dict of shards."""

    def make(*shards: Shard, digest: str = "origin") -> train.Examples:
        by_name = {shard.name: shard for shard in shards}
        size = sum(shard.images().nbytes for shard in shards)
        return train.Examples(list(by_name), {n: len(s) for n, s in by_name.items()}, by_name.__getitem__, size, digest)

    return make


@pytest.fixture(scope="session")
def trained_weights(
    digits: dict[str, Shard], design: Design, examples_of: Callable[..., train.Examples], tmp_path_factory: object
) -> bytes:
    """small_cnn after five epochs on the digits, as safetensors."""
    recipe = Train(on="digits", arch="small_cnn", epochs=5, threads=1)
    checkpoint = b""
    for checkpoint, _ in train.fit(recipe, design, examples_of(digits["train"]), Path()):  # noqa: B007
        pass
    return train.weights_of(checkpoint)


@pytest.fixture
def trained(trained_weights: bytes, design: Design) -> Classifier:
    """The trained network in evaluation mode, float32."""
    return load(design, trained_weights, Path())


@pytest.fixture
def make_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a user's module into tmp_path; returns its name, which is unique over all tests."""
    # build() puts the folder on sys.path and leaves it there.
    monkeypatch.setattr(sys, "path", sys.path[:])

    def make(source: str) -> str:
        name = f"mynets_{uuid4().hex}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        return name

    return make


@pytest.fixture(scope="session")
def part() -> Callable[..., Shard]:
    """Some samples of a shard, as a new shard."""

    def cut(shard: Shard, chosen: slice | np.ndarray, name: str = "train-000000") -> Shard:
        assert shard.pixels is not None
        # Copies: `read` gives one array as label and source label, and tests change the one without the other.
        columns = (shard.index, shard.label, shard.source_label, shard.pixels)
        return Shard(name, *(column[chosen].copy() for column in columns))

    return cut


Answer = bytes | tuple[int, dict[str, str], bytes]


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Answer]], AbstractContextManager[str]]:
    """A loopback web server that maps each path to a function, which returns a body, or status, headers and body."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    @contextmanager
    def serve(answer: Callable[..., Answer]) -> Iterator[str]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = isinstance(answer, FunctionType) and answer.__code__.co_argcount > 1  # also the headers
                given = answer(self.path, self.headers) if wanted else answer(self.path)
                status, headers, body = (200, {}, given) if isinstance(given, bytes) else given
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()

    return serve


@pytest.fixture
def network(tmp_path):
    """A small network for ten classes of grey images."""
    torch.manual_seed(0)
    return nets.build("small_cnn", 10, 1, tmp_path)
