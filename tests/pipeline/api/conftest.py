"""A finished store that all tests of the public names read."""

import copy

import pytest
from support import TINY

import notbugs


@pytest.fixture(scope="session")
def opened(tmp_path_factory):
    """The folder of a store that the small experiment was run in, and what the run returned."""
    store = tmp_path_factory.mktemp("api") / "store"
    return store, notbugs.run(copy.deepcopy(TINY), store=store, engine="inline")
