"""Where everything lives: one root on any pyarrow filesystem.

The only place that knows whether that is a local folder or an object store. Files appear whole or not
at all; which of them belong to a dataset is for commit marks and manifests to say (`artifacts`).
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from pyarrow import fs

from stages.errors import BadData, BadInput
from stages.recipes import refuse_secrets

PARTIAL = ".partial"
"""Folder for files that are being written, on the same filesystem as their final place."""

READERS = 16


def digest(content: bytes) -> str:
    """sha256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON that is equal where the value is equal."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class Store:
    """Files by their path below one root: a folder, ``s3://bucket/prefix`` or ``gs://bucket/prefix``."""

    def __init__(self, url: str) -> None:
        try:
            refuse_secrets(url)
        except ValueError as error:
            raise BadInput(f"--store: {error}") from error
        self.url = url if "://" in url else os.path.abspath(os.path.expanduser(url))  # noqa: PTH100, PTH111

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    @cached_property
    def _place(self) -> tuple[fs.FileSystem, str]:
        if "://" not in self.url:
            return fs.LocalFileSystem(), self.url
        try:
            filesystem, path = fs.FileSystem.from_uri(self.url)
        except (ValueError, OSError) as error:
            raise BadInput(f"--store {self.url}: {str(error).splitlines()[0]}") from error
        return filesystem, path

    @property
    def local(self) -> bool:
        return isinstance(self._place[0], fs.LocalFileSystem)

    def at(self, path: str) -> str:
        """The path as a person would name it."""
        return f"{self.url.rstrip('/')}/{path}"

    def _full(self, path: str) -> str:
        return f"{self._place[1].rstrip('/')}/{path}" if path else self._place[1]

    def read(self, path: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: it is not there.
        """
        with self._place[0].open_input_stream(self._full(path)) as file:
            content: bytes = file.read()
        return content

    def find(self, path: str) -> bytes | None:
        """A whole file, or None where there is none."""
        try:
            return self.read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def find_json(self, path: str) -> Any:
        """A JSON file, or None where there is none or it cannot be read as JSON."""
        content = self.find(path)
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            return None

    def find_all(self, paths: Iterable[str]) -> dict[str, bytes | None]:
        """Several files at once."""
        wanted = list(paths)
        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(wanted, pool.map(self.find, wanted), strict=True))

    def files(self, folder: str, recursive: bool = False) -> dict[str, int]:
        """Files below a folder, relative to it, with their size in bytes; empty where there is no such folder."""
        selector = fs.FileSelector(self._full(folder), allow_not_found=True, recursive=recursive)
        base = self._full(folder).rstrip("/") + "/"
        found = self._infos(selector)
        return {info.path.removeprefix(base): info.size for info in found if info.type == fs.FileType.File}

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder, sorted."""
        selector = fs.FileSelector(self._full(folder), allow_not_found=True)
        found = self._infos(selector)
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def _infos(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        try:
            return list(self._place[0].get_file_info(selector))
        except NotADirectoryError:
            return []

    def put(self, path: str, content: bytes) -> None:
        """Write a file whole: a reader finds all of it, or what was there before.

        Locally that is a file beside, read back, and a rename. On an object store it is one upload,
        which may be cut short without becoming visible as an error (pyarrow publishes what it has
        when a stream breaks): so the size is checked, and commit marks hold the digest.

        Raises:
            BadData: what was written is not what is there.
        """
        filesystem, final = self._place[0], self._full(path)
        target = self._full(f"{PARTIAL}/{uuid.uuid4().hex}") if self.local else final
        for folder in {os.path.dirname(target), os.path.dirname(final)} if self.local else ():  # noqa: PTH120
            filesystem.create_dir(folder)
        with filesystem.open_output_stream(target) as file:
            file.write(content)
        if filesystem.get_file_info(target).size != len(content):
            raise BadData(f"{self.at(path)} was not written whole: is the disk full?")
        if target != final:
            filesystem.move(target, final)

    def put_json(self, path: str, value: Any) -> bytes:
        """Write a value as JSON that a person can read; what was written."""
        content = json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
        self.put(path, content)
        return content

    def delete(self, path: str) -> None:
        """Remove a file, if it is there."""
        try:
            self._place[0].delete_file(self._full(path))
        except FileNotFoundError:
            return

    def refuse_unless_writable(self) -> None:
        """Raises:
        BadInput: nothing can be written here.
        """
        probe = f"{PARTIAL}/probe-{uuid.uuid4().hex}"
        try:
            self.put(probe, b"")
            self.delete(probe)
        except (OSError, ValueError) as error:
            raise BadInput(f"the store {self.url} cannot be written: {str(error).splitlines()[0]}") from error

    def sweep(self, older_than: float) -> None:
        """Remove what killed writers left half-made before a moment (seconds since 1970)."""
        if self.local:
            for file in Path(self._full(PARTIAL)).glob("*"):
                try:
                    if file.stat().st_mtime < older_than:
                        file.unlink()
                except FileNotFoundError:
                    continue  # its writer, or another sweep, was first
