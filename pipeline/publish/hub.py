"""A dataset on the Hugging Face Hub: commits of some shards each, then the card and the manifest, then a tag.

What the Hub has, by its digests, is not sent again, so the same push continues after an interruption.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha1
from typing import TYPE_CHECKING, Any

from pipeline.publish.push import File, Plan, files, read
from pipeline.run.artifacts import Artifact
from pipeline.run.documents import ShardName, fits
from pipeline.store import Store, digest
from stages.errors import BadInput

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT_FILES, COMMIT_BYTES = 50, 500_000_000
"""Files and bytes of a commit, at most, unless one file is larger; they are held in memory."""

SCHEME = "hf://"


def repository(dest: str) -> str:
    """``hf://user/repo`` or ``hf://datasets/user/repo`` → ``user/repo``.

    Raises:
        BadInput: it is neither.
    """
    name = dest.removeprefix(SCHEME).removeprefix("datasets/").rstrip("/")
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name):
        raise BadInput(f"{dest}: names no dataset of the Hub, expected hf://user/repo")
    return name


def api() -> "HfApi":
    """The Hub, with the token of `hf auth login` or HF_TOKEN.

    Raises:
        BadInput: the library is missing.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise BadInput("hf:// needs the library huggingface_hub: pip install 'notbugs[hub]'") from error
    disable_progress_bars()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def plan(hub: "HfApi", repo: str, store: Store, made: Artifact) -> Plan:
    """What is to be sent; shards there of other versions are to be deleted, for the card's pattern would match them.

    Raises:
        BadInput: the Hub refuses.
    """
    there, every = _there(hub, repo), files(store, made, marks=False)
    send = [file for file in every if not _is_there(store, made, file, there.get(file.name))]
    mine = {file.name for file in every}
    shards = [name for name in there if name.endswith(".tar") and fits(ShardName, name.removesuffix(".tar"))]
    delete = sorted(set(shards) - mine)
    return Plan(f"{SCHEME}{repo}", send, len(every) - len(send), delete)


def _there(hub: "HfApi", repo: str) -> dict[str, str]:
    """File of the repository → its sha256, or the id of its git blob where it is small; empty without a repository."""
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import RepositoryNotFoundError

    with _explained(repo):
        try:
            tree = list(hub.list_repo_tree(repo, repo_type="dataset"))
        except RepositoryNotFoundError:
            return {}
    return {one.path: one.lfs.sha256 if one.lfs else one.blob_id for one in tree if isinstance(one, RepoFile)}


def _is_there(store: Store, made: Artifact, file: File, there: str | None) -> bool:
    """Whether the Hub has a file with our bytes, which are read only where the Hub tells no sha256, or we know none."""
    if there is None:
        return False
    if file.sha256 is not None and len(there) == len(file.sha256):
        return there == file.sha256
    content = read(store, made, file)
    blob = sha1(b"blob %d\0%s" % (len(content), content), usedforsecurity=False).hexdigest()
    return there in (blob, digest(content))


def push(
    hub: "HfApi",
    repo: str,
    store: Store,
    made: Artifact,
    todo: Plan,
    private: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Send a plan: the shards in several commits, then all else with the deletions; tag the last with the version.

    Args:
        hub, repo: where.
        store, made: the dataset.
        todo: of `plan`.
        private: whether a repository that is made is private.
        progress: called after each commit with the number of files sent, and of all.

    Raises:
        BadInput: the Hub refuses.
        BadData: a file is damaged.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    version, sent = made.manifest["version"], 0
    message = f"{made.manifest['name']} {version}"
    with _explained(repo):
        hub.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)
        for group in _commits(todo):
            last = sent + len(group) == len(todo.send)
            operations: list[Any] = [CommitOperationAdd(file.name, read(store, made, file)) for file in group]
            operations += [CommitOperationDelete(name) for name in todo.delete] if last else []
            if operations:
                hub.create_commit(repo, operations, commit_message=message, repo_type="dataset")
            sent += len(group)
            progress(sent, len(todo.send))
        _tag(hub, repo, version, moved=bool(todo.send or todo.delete))


def _commits(todo: Plan) -> Iterator[Sequence[File]]:
    """The files of each commit; those that are no shards, and with them the manifest, come together at the end."""
    group, size = list[File](), 0
    shards = [file for file in todo.send if file.name.endswith(".tar")]
    for file in shards:
        if group and (len(group) == COMMIT_FILES or size + file.bytes > COMMIT_BYTES):
            yield group
            group, size = [], 0
        group.append(file)
        size += file.bytes
    rest = [file for file in todo.send if not file.name.endswith(".tar")]
    if group and (rest or not todo.delete):
        yield group
        group = []
    if rest or todo.delete:
        yield [*group, *rest]


def _tag(hub: "HfApi", repo: str, version: str, moved: bool) -> None:
    """Tag the newest commit with the version; a tag of an earlier push of the same version moves along."""
    refs = hub.list_repo_refs(repo, repo_type="dataset")
    there = any(tag.name == version for tag in refs.tags)
    if there and not moved:
        return
    if there:
        hub.delete_tag(repo, tag=version, repo_type="dataset")
    hub.create_tag(repo, tag=version, repo_type="dataset")


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Raises:
    BadInput: the Hub refuses a request, or cannot be reached.
    """
    from huggingface_hub import errors

    # The base of all errors of the HTTP client, which depends on the version of the library.
    unreachable: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise BadInput(f"HF_HUB_OFFLINE is set, so the Hub cannot be reached for {repo}: unset it") from error
    except (unreachable, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # uploads wrap what went wrong
        if isinstance(cause, errors.HfHubHTTPError):
            status = cause.response.status_code
            said = cause.server_message or str(cause).splitlines()[0]
            hint = "log in with `hf auth login`, or set HF_TOKEN" if status in (401, 403) else "push again to continue"
            raise BadInput(f"the Hub refuses a request for {repo} ({status}): {said}; {hint}") from error
        if isinstance(cause, unreachable):
            raise BadInput(f"the Hub cannot be reached for {repo}: {cause}; push again to continue") from error
        raise
