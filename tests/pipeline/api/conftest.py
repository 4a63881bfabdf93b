"""A finished store, read by all tests of the public API."""

import copy

import pytest
from support import TINY

import notbugs


@pytest.fixture(scope="session")
def opened(tmp_path_factory):
    """The folder of a store with the finished small experiment, and the results of its run."""
    store = tmp_path_factory.mktemp("api") / "store"
    return store, notbugs.run(copy.deepcopy(TINY), store=store, engine="inline")
