"""All that can be checked of an experiment before its run begins and before anything is written."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.experiment.graph import Node
from pipeline.experiment.sweeps import split_name
from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from pipeline.run.jobs import JOBS, Context, ModelJob, ShardJob
from pipeline.run.jobs.checks import neutral, tried
from pipeline.run.why import Reason, differences, outdated
from pipeline.store import Store
from stages.apart import forget
from stages.errors import BadInput, did_you_mean, short, some
from stages.recipes import is_own


def wanted(nodes: list[Node], only: tuple[str, ...]) -> list[Node]:
    """The nodes asked for with all that they need, in order; of a sweep, a name means all its points.

    Raises:
        BadInput: a name that is no node's.
    """
    if not only:
        return nodes
    names = {node.id: {node.id, node.name, *(split_name(name)[0] for name in (node.id, node.name))} for node in nodes}
    chosen = [node for name in only for node in nodes if name in names[node.id]]
    if missing := [name for name in only if not any(name in known for known in names.values())]:
        known = {name for several in names.values() for name in several}
        near = did_you_mean(missing[0], known) or f"; it has {some(list(names))}"
        raise BadInput(f"--only {short(missing[0])}: the experiment has no such node{near}")
    keep: set[str] = set()
    while chosen:
        node = chosen.pop()
        keep.add(node.id)
        chosen.extend(node.inputs.values())
    return [node for node in nodes if node.id in keep]


@dataclass(frozen=True)
class NodeStatus:
    """What is known of a node before a run.

    Attributes:
        job: how it is made; it has listed its source, or read its pretrained weights, if it had to.
        there: whether it stands in the store, whole.
        partial: shards that are committed, where it was not finished.
        facts: its manifest, or what is predicted of it.
        why: what differs from the newest artifact of its name, where it is to be made.
        same: folder of the same recipe under another name, which it points at, or will.
        awaits: ids of inputs to be made; where it is there, it is made again if their content comes out different.
        again: whether this version of it was made before, and is to be made once more.
    """

    job: ShardJob | ModelJob
    there: bool
    partial: int
    facts: Mapping[str, Any]
    why: Sequence[Reason] = ()
    same: str | None = None
    awaits: Sequence[str] = ()
    again: bool = False

    @property
    def node(self) -> Node:
        """The node."""
        return self.job.node

    @property
    def to_make(self) -> bool:
        """Whether a run makes it: it is not there, and is made under this name."""
        return not self.there and self.same is None

    @property
    def remark(self) -> str | None:
        """Advice on the recipe of a node that is to be made."""
        return self.job.remark() if self.to_make else None

    @property
    def state(self) -> str:
        """One phrase for a person."""
        other = f", as {self.same.rpartition('/')[0]}" if self.same else ""
        if self.there:
            return f"there{other}"
        if other:
            return f"to make{other}"
        if self.again and not self.partial:
            return "to make again"
        return f"{self.partial} shards there, rest to make" if self.partial else "to make"


def preflight(
    nodes: list[Node],
    context: Context,
    fetch: bool = True,
    at: Callable[[str], None] = lambda node: None,
    among: Collection[str] | None = None,
) -> list[NodeStatus]:
    """Check all that can be checked without doing the work, and find out what is there already.

    Sources are listed, pretrained weights read, networks built and tried once on empty images, splits and maps held
    against each other. Nothing is written to the store. What is learned is for `Run` and for an estimate of the cost:
    neither lists nor reads again.

    Args:
        nodes: what is to be made, each after its inputs.
        context: where.
        fetch: whether sources and weights that are not there may be downloaded.
        at: called with the id of each node before it is checked: a large source takes long to list.
        among: folders of the versions that a node to be made is compared with; by default all of its name.

    Raises:
        BadInput: the first thing that cannot be.
    """
    forget()
    found: dict[str, NodeStatus] = {}
    try:
        elsewhere = _Elsewhere(context.store)
        for node in nodes:
            at(node.id)
            found[node.id] = _checked(node, context, found, fetch, elsewhere, among)
    finally:
        forget()  # what was tried in another process may be as large as a model's weights
    return list(found.values())


def remarks(statuses: Sequence[NodeStatus]) -> list[str]:
    """The advice on all nodes, a line each."""
    return [f"Note: {status.job.file_key}: {status.remark}" for status in statuses if status.remark]


class _Elsewhere:
    """Where else in a store a recipe may have been made: a group is listed once, and only if something is missing."""

    def __init__(self, store: Store) -> None:
        self.store, self.names = store, dict[str, dict[str, list[str]]]()

    def find(self, job: ShardJob | ModelJob) -> Artifact | None:
        """The artifact of the same recipe under another name."""
        node = job.node
        if node.group not in self.names:
            self.names[node.group] = artifacts.names_by_version(self.store, node.group)
        for name in self.names[node.group].get(node.version, ()):
            made = (
                artifacts.find(self.store, node, f"{node.group}/{name}/{node.version}") if name != node.name else None
            )
            if made is not None and not outdated(job, made):
                return made
        return None


def _checked(
    node: Node,
    context: Context,
    found: Mapping[str, NodeStatus],
    fetch: bool,
    elsewhere: _Elsewhere,
    among: Collection[str] | None,
) -> NodeStatus:
    inputs = {role: Artifact.of(parent.folder, found[parent.id].facts) for role, parent in node.inputs.items()}
    job = JOBS[node.stage](node, context, inputs, fetch)
    job.refuse_mismatch()
    with _blaming(job):
        job.note_sources()
    made, why = artifacts.find(context.store, node), list[Reason]()
    if made is not None and (why := outdated(job, made)):
        made = None
    if made is None and (made := elsewhere.find(job)) is None:
        why = why or differences(job, among)
        with _blaming(job):
            _try_models(node, context, found)
            facts = job.predict_facts()
    else:
        facts = made.manifest
    again = made is None and bool(why and artifacts.manifest_at(context.store, node.folder))
    finished = made is not None or again
    marks = [] if finished else [f for f in context.store.files(f"{node.folder}/commits") if f.endswith(".json")]
    others = [one for one in found.values() if (one.node.group, one.node.version) == (node.group, node.version)]
    same = made.folder if made else next((one.same or one.node.folder for one in others), None)
    return NodeStatus(
        job,
        made is not None,
        len(marks),
        facts,
        [] if made else why,
        same if same != node.folder else None,
        [parent.id for parent in node.inputs.values() if not found[parent.id].there or found[parent.id].awaits],
        again,
    )


@contextmanager
def _blaming(job: ShardJob | ModelJob) -> Iterator[None]:
    """Name the entry of the file that a refusal is about."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{job.file_key}: {error}") from error


def _try_models(node: Node, context: Context, found: Mapping[str, NodeStatus]) -> None:
    """Try the user's networks among the models that are there already and that a node is made from.

    Raises:
        BadInput: one can no longer be built, or ends the process.
    """
    from stages import train
    from stages.design import Design

    for parent in node.inputs.values():
        if parent.group == "models" and found[parent.id].there and is_own(parent.arch):
            design = found[parent.id].facts["design"] | {"arch": parent.arch}
            design = Design.from_json(design | neutral(design["shape"][0]))
            tried(parent, train.refuse_misfit, design, context.here)
