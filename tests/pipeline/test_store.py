"""Files appear whole or not at all, with any number of writers; secrets stay out of URLs."""

import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.store import Store, canonical
from stages.errors import BadData, BadInput


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    return Store(str(tmp_path / "s") if request.param == "folder" else request.getfixturevalue("s3_url"))


def test_what_is_put_is_found_and_listed(store):
    assert store.find("a/b.json") is None
    assert store.files("a") == {} and store.folders("a") == []
    store.put("a/b.json", b"one")
    store.put("a/c/d.tar", b"four!")
    store.put("a/e", b"")
    assert store.read("a/b.json") == b"one" and store.read("a/e") == b""
    assert store.files("a") == {"b.json": 3, "e": 0}
    assert store.files("a", recursive=True) == {"b.json": 3, "c/d.tar": 5, "e": 0}
    assert store.folders("a") == ["c"] and store.folders("") in (["a"], [".partial", "a"])
    store.delete("a/b.json")
    store.delete("a/b.json")
    assert store.find_all(["a/b.json", "a/c/d.tar"]) == {"a/b.json": None, "a/c/d.tar": b"four!"}
    assert store.files("a", recursive=True) == {"c/d.tar": 5, "e": 0}


def test_a_folder_goes_with_all_that_is_in_it_and_nothing_else(store):
    for path in ("a/b/c", "a/b/d/e", "a/bc/f", "a/g"):
        store.put(path, b"x")
    store.delete_folder("a/b")
    store.delete_folder("a/b")
    assert store.files("", recursive=True) == {"a/bc/f": 1, "a/g": 1}
    with pytest.raises(BadData, match="is no path in a store"):
        store.delete_folder("a/../..")


def test_a_file_is_replaced_whole(store):
    for content in (b"first", b"2", b"the third"):
        store.put("a/f", content)
        assert (store.read("a/f"), store.files("a")) == (content, {"f": len(content)})


def test_json_is_found_as_it_was_put_and_what_is_none_is_not_found(store):
    store.put_json("a.json", {"ε": [1, None]})
    store.put("b.json", b'{"cut": ')
    assert store.find_json("a.json") == {"ε": [1, None]}
    assert store.find_json("b.json") is None and store.find_json("c.json") is None


def test_trying_whether_a_store_can_be_written_leaves_nothing_in_it(store):
    store.refuse_unless_writable()
    assert store.files("", recursive=True) == {}


def test_readers_never_see_half_a_file_while_many_write_it(store):
    versions = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(9) as pool:
        writers = [pool.submit(lambda v=v: [store.put("f", v) for _ in range(20)]) for v in versions]
        while not all(writer.done() for writer in writers):
            found = store.find("f")
            assert found is None or found in versions
    assert [writer.result() for writer in writers]
    assert store.files("", recursive=True) == {"f": 100_000}


def test_a_store_travels_to_workers_as_its_url_alone(store):
    store.put("f", b"x")
    assert pickle.loads(pickle.dumps(store)).read("f") == b"x"
    assert len(pickle.dumps(store)) < 300


def test_only_old_leftovers_of_killed_writers_are_swept(tmp_path):
    store = Store(str(tmp_path))
    store.put("f", b"x")
    (tmp_path / ".partial/left").write_bytes(b"half")
    store.sweep(older_than=time.time() - 60)
    assert (tmp_path / ".partial/left").exists()
    store.sweep(older_than=time.time() + 60)
    assert not (tmp_path / ".partial/left").exists()
    assert store.read("f") == b"x"


@pytest.mark.parametrize("url", ["s3://KEY:SECRET@bucket/x", "s3://bucket/x?access_key=KEY", "gs://me@bucket/x"])
def test_a_url_with_credentials_is_refused_without_repeating_them(url):
    with pytest.raises(BadInput) as refused:
        Store(url)
    assert "KEY" not in str(refused.value) and "environment" in str(refused.value)


def test_a_scheme_that_is_none_is_refused():
    with pytest.raises(BadInput, match="ftp"):
        Store("ftp://host/x").find("f")


WRITE_TOO_MUCH = """
import resource, sys
from pathlib import Path
from pipeline.store import Store
from stages.errors import BadData, BadInput

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
store = Store(str(folder))
store.put("f", b"before")
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    store.put("f", bytes(3_000_000))
except BadInput as error:
    print(error)
print([file.name for file in (folder / ".partial").iterdir()], store.read("f"))
"""


def test_a_file_that_the_disk_does_not_take_is_one_sentence_and_leaves_nothing_behind(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", WRITE_TOO_MUCH, tmp_path, "1000000"], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines() == [
        f"the disk of the store {tmp_path} is full (File too large); free some space and resume",
        "[] b'before'",
    ]


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path):
    small = 'mount -t tmpfs -o size=1m tmpfs "$1" || exit 77; exec "$2" -c "$3" "$1" 0'
    line = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", small, "sh"]
    line += [str(tmp_path), sys.executable, WRITE_TOO_MUCH]
    found = subprocess.run(line, capture_output=True, text=True, check=False)
    if found.returncode == 77 or "unshare" in found.stderr:
        pytest.skip("a small disk cannot be mounted here")
    assert found.stdout.splitlines() == [
        f"the disk of the store {tmp_path} is full (No space left on device); free some space and resume",
        "[] b'before'",
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(), JSON, max_size=5))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value):
    assert canonical(value) == canonical(dict(reversed(value.items())))
