"""The store on a real S3 server: few requests, whole files, one sentence per error, and a server that goes away."""

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, Timer

import pytest
from s3 import ACCESS_KEY, SECRET_KEY, S3Server
from support import command

from pipeline.store import ONE_PUT, Store
from stages import remote
from stages.errors import BadInput

ROOT = Path(__file__).parents[2]


@pytest.fixture
def asked(s3):
    """Counts the requests of some work."""

    def asked(work) -> Counter[str]:
        before = s3.requests()
        work()
        return s3.requests() - before

    return asked


@pytest.fixture
def unknown():
    """Forgets all connections, before the test and after it."""
    remote.connect.cache_clear()
    yield
    remote.connect.cache_clear()


@contextmanager
def away(server: S3Server, seconds: float):
    """Kill the server now, and start it again after some seconds."""
    server.kill()
    start = Timer(seconds, server.start)
    start.start()
    try:
        yield
    finally:
        start.join()


@contextmanager
def answering(answer):
    """The URL of a loopback server that passes each request to a function."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                while (size := int(self.rfile.readline(), 16)) > 0:
                    self.rfile.read(size + 2)
                while self.rfile.readline().strip():
                    pass
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = answer(self.command)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one  # noqa: N815

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def refusal(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>said {SECRET_KEY}</Message></Error>".encode()


# ------------------------------------------------------------------------------------------- few requests


def test_a_store_is_met_with_one_listing(s3_url, asked):
    assert asked(lambda: Store(s3_url).files("")) == {"LIST": 2}


def test_a_file_is_one_request_to_write_and_two_to_read(s3_url, asked):
    store = Store(s3_url)
    store.files("")
    assert asked(lambda: store.put("small", b"x")) == {"PUT": 1}
    assert asked(lambda: store.put("large", bytes(ONE_PUT))) == {"PUT": 1}
    assert asked(lambda: store.read("large")) == {"HEAD": 1, "GET": 1}
    assert asked(lambda: store.find("none")) == {"HEAD": 1}


def test_a_larger_file_goes_in_parts_of_10_mib(s3_url, asked):
    store = Store(s3_url)
    store.files("")
    content = os.urandom(1000) * 25_000
    assert asked(lambda: store.put("f", content)) == {"POST": 2, "PUT": 3}
    assert asked(lambda: store.read("f")) == {"HEAD": 1, "GET": 1}
    assert store.read("f") == content


def test_what_is_there_is_learnt_from_one_request_per_thousand_files(s3_url, asked):
    store = Store(s3_url)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.put(f"a/{number % 7}/{number}", b""), range(1001)))
    assert asked(lambda: store.files("a", recursive=True)) == {"LIST": 2}
    assert len(store.files("a", recursive=True)) == 1001
    assert asked(lambda: store.folders("a")) == {"LIST": 1}


# -------------------------------------------------------------------------------------- whole or not at all


def test_what_is_changed_on_the_way_is_noticed_and_sent_again(s3, s3_url, monkeypatch, unknown):
    content = b"A" * 100_000
    with damaging(s3.ports["s3"], b"AAAAAAAA", b"AAAABAAA") as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        store = Store(s3_url)
        store.put("f", content)
        assert store.retries == 1
        assert store.read("f") == content


@contextmanager
def damaging(port: int, right: bytes, wrong: bytes):
    """The port of a proxy that forwards everything to another port, but once changes some bytes on the way there."""
    todo = [wrong]

    def pump(source: socket.socket, target: socket.socket, damage: bool) -> None:
        try:
            while data := source.recv(65536):
                if damage and todo and right in data:
                    data = data.replace(right, todo.pop(), 1)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one end has closed

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        over, ends = False, list[socket.socket]()

        def serve() -> None:
            while not over:
                try:
                    client = listening.accept()[0]
                except TimeoutError:
                    continue
                client.setblocking(True)
                server = socket.create_connection(("127.0.0.1", port))
                ends.extend((client, server))
                Thread(target=pump, args=(client, server, True), daemon=True).start()
                Thread(target=pump, args=(server, client, False), daemon=True).start()

        serving = Thread(target=serve)
        serving.start()
        yield listening.getsockname()[1]
        over = True
        serving.join()
        for end in ends:
            end.close()


def test_a_large_upload_that_fails_leaves_what_was_there(s3, s3_url, monkeypatch):
    store = Store(s3_url)
    store.put("f", b"before")
    with monkeypatch.context() as hurried, away(s3, 0.5), pytest.raises(ConnectionError):
        hurried.setattr(remote, "PATIENCE", 0.1)
        store.put("f", bytes(2 * ONE_PUT))
    assert store.read("f") == b"before"


def test_json_that_grows_while_it_is_read_is_read_whole(s3_url):
    store = Store(s3_url)
    values = [{"list": list(range(length))} for length in (10, 1000)]
    store.put_json("f", values[0])
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(rewrite, store, values)
        while not writer.done():
            assert store.find_json("f") in values
        writer.result()


def rewrite(store: Store, values: list) -> None:
    for value in values * 20:
        store.put_json("f", value)
        time.sleep(0.03)


# ------------------------------------------------------------------------------------ the server goes away


def test_writes_arrive_although_the_server_is_killed_and_starts_again(s3, s3_url):
    store = Store(s3_url)
    store.put("before", b"")
    with away(s3, 1), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: store.put(f"f/{number}", bytes(number)), range(20)))
    assert store.retries > 0
    assert store.files("f") == {str(number): number for number in range(20)}


def test_a_store_that_stays_away_is_one_sentence_and_no_fault_of_the_request(s3, s3_url, monkeypatch):
    store = Store(s3_url)
    store.put("f", b"")
    monkeypatch.setattr(remote, "PATIENCE", 1.0)
    with away(s3, 1.5), pytest.raises(ConnectionError) as failed:
        store.put("f", b"x")
    assert str(failed.value) == (
        f"the store {s3_url} was unavailable for 1 s, writing f: Could not connect to server; when it is back, resume"
    )


def test_a_worker_waits_for_a_store_that_is_away_as_it_starts(s3, s3_url, unknown):
    sent = pickle.dumps(Store(s3_url))
    with away(s3, 0.5):
        received = pickle.loads(sent)
        received.put("f", b"x")
    assert received.retries > 0
    assert received.read("f") == b"x"


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (400, "RequestTimeout")])
def test_what_may_pass_is_asked_again(status, code, s3, monkeypatch, unknown):
    answers = [(200, b"<ListBucketResult/>"), (status, refusal(code)), (status, refusal(code)), (200, b"")]
    with answering(lambda method: answers.pop(0)) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = Store("s3://bucket/store")
        store.put("f", b"x")
    assert store.retries == 2 and not answers


# -------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (400, "ExpiredToken", "the keys have expired (ExpiredToken); renew them and resume"),
        (403, "RequestTimeTooSkewed", "it finds this machine's clock wrong (REQUEST_TIME_TOO_SKEWED); set it right"),
        (301, "PermanentRedirect", "the bucket bucket is in another region (PermanentRedirect); set AWS_REGION"),
        (507, "XMinioStorageFull", "it is full (XMinioStorageFull); free some space and resume"),
        (400, "InvalidArgument", "it refuses a request (InvalidArgument, HTTP status 400): said $AWS_SECRET_ACCESS"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_not_asked_again(status, code, sentence, s3, monkeypatch, unknown):
    answers = [(200, b"<ListBucketResult/>"), (status, refusal(code))]
    with answering(lambda method: answers.pop(0)) as url, pytest.raises(BadInput) as refused:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        Store("s3://bucket/store").put("f", b"x")
    assert re.match(f"the store s3://bucket/store:? {re.escape(sentence)}", str(refused.value))
    assert not answers


def test_why_a_read_is_refused_is_found_out(s3, monkeypatch, unknown):
    """pyarrow reads with a HEAD first, and a refusal of that has no body: so a listing is asked for the reason."""
    answers = [(200, b"<ListBucketResult/>"), (400, b""), (400, refusal("ExpiredToken"))]
    with answering(lambda method: answers.pop(0)) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(BadInput, match=r"the keys have expired \(ExpiredToken\); renew them and resume"):
            Store("s3://bucket/store").read("f")


WRONG = {
    "key": ({"AWS_ACCESS_KEY_ID": "OTHERKEY"}, "it refuses the keys (INVALID_ACCESS_KEY_ID); check AWS_ACCESS_KEY_ID"),
    "secret": ({"AWS_SECRET_ACCESS_KEY": "other"}, "it refuses the keys (SIGNATURE_DOES_NOT_MATCH); check AWS_ACCESS"),
    "no keys": (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
        "it denies access (ACCESS_DENIED); AWS_ACCESS_KEY_ID is not set, so the configuration file or this",
    ),
    "endpoint": (
        {"AWS_ENDPOINT_URL": "http://me:password@127.0.0.1:9"},
        "cannot be reached at 127.0.0.1:9 (AWS_ENDPOINT_URL): Could not",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_keys_and_endpoints_are_one_sentence_at_once(wrong, s3, s3_url, tmp_path, monkeypatch, notbugs, write):
    changes, sentence = WRONG[wrong]
    monkeypatch.setenv("HOME", str(tmp_path))  # where a developer may have keys
    for name, value in changes.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    began = time.monotonic()
    found = notbugs("status", "--store", s3_url)
    assert time.monotonic() - began < 30
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith(f"Error: the store {s3_url}") and sentence in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not re.search(f"{ACCESS_KEY}|{SECRET_KEY}|OTHERKEY|password", found.stderr)


def test_a_bucket_that_is_not_there_is_one_sentence_from_every_command(s3, notbugs, write, tiny):
    file, host = write(tiny), s3.url.removeprefix("http://")
    for arguments in (
        ["plan", file],
        ["run", file, "--engine", "inline"],
        ["status"],
        ["show"],
        ["verify"],
        ["resume"],
    ):
        found = notbugs(*arguments, "--store", "s3://nowhere/store")
        assert (found.returncode, found.stdout) == (2, "")
        assert found.stderr == (
            f"Error: the store s3://nowhere/store: there is no bucket nowhere at {host} (AWS_ENDPOINT_URL); "
            "create it or correct --store\n"
        )


def test_a_url_without_a_bucket_is_refused(s3):
    with pytest.raises(BadInput, match="names no bucket, expected for example s3://bucket/folder"):
        Store("s3://").find("f")


# ---------------------------------------------------------------------------------- whole experiments


def kept(contents: dict[str, bytes]) -> dict[str, bytes]:
    """Files of nodes whose bytes are guaranteed: those without times, hosts and speeds."""
    changing = r"^runs/|manifest\.json$|commits/.*\.json$|metrics\.jsonl$|README\.md$|croissant\.json$|^index\.html$"
    return {path: content for path, content in contents.items() if not re.search(changing, path)}


def digests(contents: dict[str, bytes]) -> dict[str, str]:
    manifests = [json.loads(content) for path, content in contents.items() if path.endswith("manifest.json")]
    return {f"{facts['group']}/{facts['name']}": facts["content"] for facts in manifests}


def on_disk(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> dict[str, bytes]:
    """The files of the small experiment in a folder."""
    from support import TINY

    folder = tmp_path_factory.mktemp("local")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    line = [command(), "run", "tiny.json", "--engine", "inline", "--store", "store"]
    subprocess.run(line, cwd=folder, capture_output=True, check=True, timeout=240)
    return on_disk(folder / "store")


def same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert digests(found) == digests(expected)
    assert kept(found).keys() == kept(expected).keys()
    assert [path for path in kept(found) if found[path] != expected[path]] == []


def test_an_experiment_on_s3_has_the_bytes_of_a_local_one_and_no_keys(
    s3, s3_url, notbugs, write, tiny, local, monkeypatch
):
    file = write(tiny)
    made = notbugs("run", file, "--engine", "inline", "--store", s3_url)
    assert made.returncode == 0, made.stderr
    found = s3.contents(s3_url.removeprefix("s3://"))
    same(found, local)
    for text in (made.stdout.encode(), made.stderr.encode(), *found.values()):
        assert ACCESS_KEY.encode() not in text and SECRET_KEY.encode() not in text
    for arguments in (["plan", file], ["status"], ["show"], ["verify"]):
        looked = notbugs(*arguments, "--store", s3_url)
        assert (looked.returncode, looked.stderr) == (0, "")
        assert SECRET_KEY not in looked.stdout


# -------------------------------------------------------------------------------------------- the end


USE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pipeline.store import Store

store = Store(sys.argv[1])
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda number: store.put(str(number), bytes(12_000_000 * (number == 3))), range(8)))
print(len(store.files("")))
"""


def test_a_process_that_used_s3_ends_at_once_and_in_silence(s3_url):
    began = time.monotonic()
    found = subprocess.run([sys.executable, "-c", USE, s3_url], capture_output=True, text=True, check=False, timeout=60)
    assert (found.returncode, found.stdout, found.stderr) == (0, "8\n", "")
    assert time.monotonic() - began < 20


START = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from s3 import S3Server

with S3Server(Path(sys.argv[2])) as server:
    print(server.ports["s3"], flush=True)
    time.sleep(60)
"""


def test_the_server_ends_with_a_process_that_is_killed(s3, tmp_path):
    line = [sys.executable, "-c", START, str(ROOT / "tests"), str(tmp_path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as starting:
        assert starting.stdout is not None
        port = int(starting.stdout.readline())
        starting.send_signal(signal.SIGKILL)
    end = time.monotonic() + 20
    while answers(port):
        assert time.monotonic() < end
        time.sleep(0.1)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
