"""Files appear whole or not at all, by any number of writers; secrets stay out of URLs."""

import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.store import Store, canonical
from stages.errors import BadInput


def test_what_is_put_is_found_and_listed(tmp_path):
    store = Store(str(tmp_path / "s"))
    assert store.find("a/b.json") is None
    assert store.files("a") == {} and store.folders("a") == []
    store.put("a/b.json", b"one")
    store.put("a/c/d.tar", b"four!")
    assert store.read("a/b.json") == b"one"
    assert store.files("a") == {"b.json": 3}
    assert store.files("a", recursive=True) == {"b.json": 3, "c/d.tar": 5}
    assert store.folders("a") == ["c"]
    store.delete("a/b.json")
    store.delete("a/b.json")
    assert store.find_all(["a/b.json", "a/c/d.tar"]) == {"a/b.json": None, "a/c/d.tar": b"four!"}


def test_readers_never_see_half_a_file_while_many_write_it(tmp_path):
    store = Store(str(tmp_path))
    versions = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(9) as pool:
        writers = [pool.submit(lambda v=v: [store.put("f", v) for _ in range(20)]) for v in versions]
        while not all(writer.done() for writer in writers):
            found = store.find("f")
            assert found is None or found in versions
    assert not list((tmp_path / ".partial").iterdir())


def test_a_store_travels_to_workers_as_its_url_alone(tmp_path):
    store = Store(str(tmp_path))
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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(), JSON, max_size=5))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value):
    assert canonical(value) == canonical(dict(reversed(value.items())))
