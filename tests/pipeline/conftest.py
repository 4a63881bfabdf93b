"""A finished store, read by the tests of the public API and of what is published."""

import copy

import pytest
from support import TINY

import notbugs

ABOUT = {
    "license": "cc-by-4.0",
    "source": "https://archive.ics.uci.edu/dataset/80",
    "creators": ["E. Alpaydin", "C. Kaynak"],
    "citation": "@misc{digits, title={Optical Recognition of Handwritten Digits}}",
}


@pytest.fixture(scope="session")
def opened(tmp_path_factory):
    """The folder of a store with the finished small experiment, and the results of its run; nobody changes it."""
    store = tmp_path_factory.mktemp("api") / "store"
    return store, notbugs.run({**copy.deepcopy(TINY), "about": ABOUT}, store=store, engine="inline")
