"""Removals under way, and how they and runs keep out of each other's way.

A removal (`notbugs gc`) writes a notice of what it is about to remove, then reads the records of runs. A run writes its
record, then reads the notices. Each writes before it reads, so at least one of the two sees the other: a removal spares
what a running run names, and a run waits until a removal is done with the versions that it names.

A killed removal leaves its notice behind. A run takes a notice that has not changed for `SILENCE` for abandoned, and
deletes it; a removal that was merely suspended finds its notice missing and stops.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Lock, Thread
from typing import Any

from pipeline.run import documents
from pipeline.run.documents import Count, Document, Folder
from pipeline.store import Store
from stages.errors import BadData, BadInput

ROOT = ".gc"

BEAT = 5.0
"""Seconds between two writes of a notice."""

SILENCE = 30.0
"""Seconds without a change after which a notice counts as abandoned, by the clock of the run that waits."""

POLL = 1.0
"""Seconds between two looks at a notice."""


class NoticeFile(Document):
    """``.gc/<removal>.json``: a removal under way, and what it has yet to remove."""

    removal: str
    host: str
    pid: Count
    beat: Count
    folders: list[Folder]


class Notice:
    """The notice of this process's removal."""

    def __init__(self, store: Store, host: str, folders: Sequence[str]) -> None:
        self.store, self.left, self.host = store, list(folders), host
        self.id = secrets.token_hex(8)
        self.path = f"{ROOT}/{self.id}.json"
        self.beat, self.lock, self.ended = 0, Lock(), Event()
        self.last = time.monotonic()

    def write(self) -> None:
        with self.lock:
            self.beat += 1
            about = {"removal": self.id, "host": self.host, "pid": os.getpid(), "beat": self.beat}
            self.store.put_json(self.path, about | {"folders": self.left})
            self.last = time.monotonic()

    def done(self, folder: str) -> None:
        """Let go of a folder; runs that wait for it see so at the next beat."""
        with self.lock:
            self.left.remove(folder)

    def refuse_if_abandoned(self) -> None:
        """Raises:
        BadData: after a pause, a run may have taken this removal for abandoned, and may use what is left.
        """
        if self._late or self.store.find(self.path) is None:
            raise BadData("the removal paused for so long that a run may take it for abandoned; run `notbugs gc` again")

    @property
    def _late(self) -> bool:
        return time.monotonic() - self.last > SILENCE / 2

    def keep_beating(self) -> None:
        while not self.ended.wait(BEAT):
            with suppress(OSError, BadInput):  # the store is away; the removal itself reports it
                if self._late or self.store.find(self.path) is None:
                    return  # a run may have deleted the notice, which must not come back
                self.write()


@contextmanager
def announced(store: Store, host: str, folders: Sequence[str]) -> Iterator[Notice]:
    """Keep a notice in the store that these folders are about to be removed."""
    notice = Notice(store, host, folders)
    notice.write()
    thread = Thread(target=notice.keep_beating, daemon=True, name="removal")
    thread.start()
    try:
        yield notice
    finally:
        notice.ended.set()
        thread.join()
        store.delete(notice.path)


def condemned(store: Store) -> dict[str, str]:
    """``<group>/<name>/<version>`` → path of the notice that it is about to be removed."""
    found: dict[str, str] = {}
    for name in store.files(ROOT):
        notice = documents.find(store, f"{ROOT}/{name}", NoticeFile)
        found |= dict.fromkeys(notice["folders"] if notice else (), f"{ROOT}/{name}")
    return found


def wait(store: Store, path: str, folder: str, pause: Callable[[float], Any] = time.sleep) -> None:
    """Wait until a removal is done with a folder, or abandoned."""
    seen, since = None, time.monotonic()
    while (notice := documents.find(store, path, NoticeFile)) is not None and folder in notice["folders"]:
        if notice["beat"] != seen:
            seen, since = notice["beat"], time.monotonic()
        elif time.monotonic() - since > SILENCE:
            store.delete(path)
            return
        pause(POLL)


def sweep(store: Store, older_than: float) -> None:
    """Delete notices of killed removals that were last written before a time (seconds since 1970)."""
    for name, found in store.stats(ROOT).items():
        if found.modified < older_than:
            store.delete(f"{ROOT}/{name}")
