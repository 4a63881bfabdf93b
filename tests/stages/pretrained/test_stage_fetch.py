"""Files by path and URL: on disk, in packages, on web servers and object stores."""

import os
import re
import socket
import sys
import time
from pathlib import Path

import pytest
from s3 import S3Server

from stages import remote
from stages.errors import BadData
from stages.pretrained import fetch
from stages.pretrained.fetch import fetched, is_elsewhere

CONTENT = bytes(range(256)) * 9000
"""More than two pieces."""


def read(place, data="/nowhere"):
    with fetched(str(place), Path(data)) as path:
        return path.read_bytes()


def refused(place, data="/nowhere"):
    """The message about a refused place."""
    with pytest.raises(BadData) as caught, fetched(str(place), Path(data)):
        pass
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert not re.search(r"\wError|Exception|Errno", sentence), "no name of an exception"
    return sentence


# ---------------------------------------------------------------------------------------------- on disk


def test_a_file_is_read_by_its_path_and_as_a_file_url(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "a b#c?é.pt"
    file.write_bytes(CONTENT)
    assert read(file.name, tmp_path) == read(file) == read(f"~/{file.name}") == CONTENT
    assert read(file.as_uri()) == read(f"file://{file}") == read(f"FILE://localhost{file}") == CONTENT
    assert not is_elsewhere(file.as_uri()) and not is_elsewhere("a.pt") and not is_elsewhere("package://a/b")
    assert is_elsewhere("https://host/a.pt") and is_elsewhere("s3://bucket/a.pt")


def test_a_file_in_the_current_folder_is_not_in_that_of_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("w.pt").write_bytes(b"")
    assert refused("w.pt", tmp_path / "data").endswith("/data/w.pt); it is in the current folder: add `--data .`")


def test_what_is_no_file_is_told_at_once(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.safetensors").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "endless.pt").open("wb") as file:
        file.truncate(fetch.MOST + 1)  # takes no space
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    for name, sentence in {
        "none.pt": "cannot be read: No such file or directory",
        "none.pt/w.pt": "cannot be read: No such file or directory",
        "folder": "is a folder: name the file in it, such as model.safetensors",
        "": "is a folder: name the file in it",
        "pipe": "is a pipe or a device, not a file",
        "socket": "is a pipe or a device, not a file",
        "/dev/zero": "is a pipe or a device, not a file",
        "endless.pt": f"has {fetch.MOST + 1:,} bytes: more than {fetch.MOST:,} are not read",
        "a\0b": "cannot be read: it is not a valid path",
        "\ud800": "cannot be read: it is not a valid path",
        "x" * 300: "cannot be read: File name too long",
        "~no_such_user/w.pt": "cannot be read: the home folder behind ~",
        "file://w.pt": "cannot be read: a file:// URL has three slashes",
    }.items():
        assert refused(name, tmp_path).startswith(sentence)
    listening.close()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that contains files and must not be imported for them."""
    folder = tmp_path / "site" / "some_weights" / "files"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield folder
    sys.modules.pop("some_weights", None)


def test_a_file_is_read_from_inside_a_package_and_nothing_of_it_runs(package):
    (package / "w.pt").write_bytes(CONTENT)
    assert read("package://some_weights/files/w.pt") == read("package://some_weights.files/w.pt") == CONTENT
    assert "some_weights" not in sys.modules


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("some_weights/files/none.pt", "No such file"),
        ("some_weights/files", "is a folder: name the file in it"),
        ("some_weights/../../w.pt", "expected package://PACKAGE/FILE, a file inside of the package"),
        ("/w.pt", "expected package://PACKAGE/FILE"),
        ("some.one/else/w.pt", "the Python package some is not installed here"),
        ("not_installed_at_all/w.pt", "the Python package not_installed_at_all is not installed here; install it"),
        ("this/w.pt", "this is a module of one file"),
    ],
)
def test_a_package_without_the_file_is_refused(name, reason, package):
    assert reason in refused(f"package://{name}")


# ------------------------------------------------------------------------------------------- web servers


@pytest.fixture
def hasty(monkeypatch):
    """Short pauses between few retries, and a silence that a busy machine does not reach."""
    monkeypatch.setattr(remote, "FIRST_PATIENCE", 0.2)
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "SILENCE", 5.0)


def test_a_file_of_a_web_server_is_fetched_and_gone_afterwards(serving, hasty):
    places = {"/a%20b%C3%A9.pt?download=1": CONTENT, "/moved": (302, {"Location": "/a%20b%C3%A9.pt?download=1"}, b"")}
    with serving(places.__getitem__) as url:
        assert read(f"{url}/a bé.pt?download=1") == CONTENT
        assert read(f"{url}/a%20b%C3%A9.pt?download=1") == CONTENT
        with fetched(f"{url.replace('http', 'HTTP')}/moved", Path()) as path:
            assert path.read_bytes() == CONTENT
        assert not path.exists()


@pytest.mark.parametrize(
    "trouble",
    [
        (503, {}, b"busy"),
        (429, {}, b"too many"),
        (200, {"Content-Length": str(len(CONTENT))}, CONTENT[:1_500_000]),
        (200, {"Transfer-Encoding": "chunked"}, b"40\r\nabc"),
    ],
    ids=["busy", "too many requests", "breaks off", "breaks off in a chunk"],
)
def test_what_may_pass_is_asked_again(trouble, serving, hasty):
    answers = [trouble, trouble, CONTENT]
    with serving(lambda _: answers.pop(0)) as url:
        assert read(f"{url}/w.pt") == CONTENT
    assert not answers


HUGE = str(10**15)


@pytest.mark.parametrize(
    ("answer", "sentence", "times"),
    [
        ((404, {}, b""), "cannot be fetched: there is no such file (404 Not Found)", 1),
        ((410, {}, b""), "cannot be fetched: there is no such file (410 Gone)", 1),
        ((403, {}, b""), "cannot be fetched: the server denies access (403 Forbidden): fetch it yourself", 1),
        ((401, {}, b""), "cannot be fetched: the server denies access (401 Unauthorized): fetch it yourself", 1),
        ((400, {}, b""), "cannot be fetched: the server answers 400 Bad Request", 1),
        ((302, {"Location": "/again"}, b""), "cannot be fetched: the server answers 302 Found", 5),
        ((302, {"Location": "file:///etc/passwd"}, b""), "cannot be fetched: the server answers 302 Found", 1),
        ((200, {"Content-Length": HUGE}, b""), f"has {10**15:,} bytes: more than {fetch.MOST:,} are not fetched", 1),
        ((500, {}, b""), "cannot be fetched: the server answers 500 Internal Server Error", 2),
        ((200, {"Content-Length": "9"}, b"abc"), "cannot be fetched: the connection breaks off after 3 of 9 bytes", 3),
    ],
    ids=lambda value: str(value[:2]) if isinstance(value, tuple) else "",
)
def test_what_will_not_come_is_one_sentence(answer, sentence, times, serving, hasty):
    asked = []
    with serving(lambda path: asked.append(path) or answer) as url:
        assert refused(f"{url}/w.pt").startswith(sentence)
    assert len(asked) >= times if times > 1 else len(asked) == 1


def test_a_file_without_end_is_given_up(serving, hasty, monkeypatch):
    monkeypatch.setattr(fetch, "MOST", 2_000_000)
    with serving(lambda _: (200, {"Content-Length": ""}, CONTENT)) as url:
        assert refused(f"{url}/w.pt") == "has more than 2,000,000 bytes, which are not fetched"


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"], ids=["nothing", "a part"])
def test_a_server_that_falls_silent_is_not_waited_for(said, hasty, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        held = []

        def answer():
            while len(held) < 9:
                connection, _ = server.accept()
                connection.sendall(said)
                held.append(connection)

        from threading import Thread

        Thread(target=answer, daemon=True).start()
        sentence = refused(f"http://127.0.0.1:{server.getsockname()[1]}/w.pt")
        for connection in held:
            connection.close()
    assert sentence == "cannot be fetched: the server is silent for 0 s"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("http://127.0.0.1:9/w.pt", "cannot be fetched: Connection refused"),
        ("http://nowhere.invalid/w.pt", "cannot be fetched: its host is not known; check the address and the network"),
        ("http:///w.pt", "cannot be fetched: no host given"),
        ("http://127.0.0.1:port/w.pt", "cannot be fetched: it is not a valid URL"),
        ("ftp://127.0.0.1/w.pt", "cannot be read: expected a path, or file://, http://"),
        ("nonsense://a/w.pt", "cannot be read: expected a path, or file://, http://"),
        ("s3://", "cannot be read: it does not name a file, expected for example s3://bucket/folder/file"),
        ("s3://bucket", "cannot be read: it does not name a file"),
        ("S3://bucket/folder/?region=a", "cannot be read: it does not name a file"),
        ("s3:///w.pt", "cannot be read: "),
    ],
)
def test_an_address_that_cannot_be_is_one_sentence(place, sentence, hasty, serving):
    assert refused(place).startswith(sentence)


def test_what_is_no_web_server_is_told(hasty):
    with socket.create_server(("127.0.0.1", 0)) as server:
        from threading import Thread

        def answer():
            for _ in range(50):
                connection, _ = server.accept()
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")
                connection.close()

        Thread(target=answer, daemon=True).start()
        place = f"127.0.0.1:{server.getsockname()[1]}/w.pt"
        assert refused(f"http://{place}").startswith("cannot be fetched: ")
        assert refused(f"https://{place}").startswith("cannot be fetched: ")


# ----------------------------------------------------------------------------------------- object stores


@pytest.fixture
def unknown():
    """Forgets all connections, before the test and after it."""
    remote.connect.cache_clear()
    yield
    remote.connect.cache_clear()


def test_a_file_of_an_object_store_is_fetched(s3: S3Server, s3_url, unknown):
    with s3.filesystem.open_output_stream(f"{s3_url.removeprefix('s3://')}/a b.pt") as file:
        file.write(CONTENT)
    assert read(f"{s3_url}/a b.pt") == read(f"{s3_url}/a%20b.pt") == CONTENT
    assert refused(f"{s3_url}/none.pt") == "cannot be read: there is no such file"


def test_what_an_object_store_refuses_is_one_sentence(s3: S3Server, s3_url, unknown, hasty, monkeypatch):
    assert refused("s3://nowhere-at-all/w.pt").startswith("cannot be read: there is no ")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    remote.connect.cache_clear()
    sentence = refused(f"{s3_url}/w.pt")
    assert sentence.startswith("cannot be read: ") and "wrong" not in sentence and "--store" not in sentence
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    remote.connect.cache_clear()
    assert refused(f"{s3_url}/w.pt").startswith("cannot be read: ")
