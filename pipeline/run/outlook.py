"""The time that a run still takes, from the speed of its nodes that ran.

No trial is made, as for `plan --cost`: each node's work is counted in the same parts, and a kind of work is as fast as
it was when a node of this run did it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.run.jobs.base import source_of
from pipeline.run.jobs.evaluations import UsefulnessJob
from pipeline.run.jobs.work import Work
from pipeline.run.preflight import NodeStatus
from pipeline.store import digest

Kind = str
"""What nodes have in common whose work is equally fast: the digest of its parts, or else the stage."""


@dataclass(frozen=True)
class Amount:
    """The work of a node.

    Attributes:
        kinds: what it is like, the closest first.
        passes: of an image through a network, those of a step counted as one.
    """

    kinds: tuple[Kind, ...]
    passes: float


@dataclass(frozen=True)
class Left:
    """Seconds that a run still takes; `least` if some of its nodes are of a kind that did not run yet."""

    seconds: float
    least: bool


class Outlook:
    """Estimates the time left of a run.

    Args:
        statuses: what `preflight` found, each node after its inputs.
    """

    def __init__(self, statuses: Sequence[NodeStatus]) -> None:
        known = {status.node.id: status for status in statuses}
        self.inputs = {name: [parent.id for parent in status.node.inputs.values()] for name, status in known.items()}
        self.amounts = {name: _amount(status, known) for name, status in known.items() if not status.there}
        self.seen: dict[Kind, tuple[float, float]] = {}

    def ran(self, node: str, seconds: float) -> None:
        """Learn from a node that was made in this run."""
        if (amount := self.amounts.get(node)) is not None and amount.passes:
            for kind in amount.kinds:
                before, passes = self.seen.get(kind, (0.0, 0.0))
                self.seen[kind] = (before + seconds, passes + amount.passes)

    def expected(self, node: str) -> float | None:
        """Seconds that a node takes; None if none like it ran."""
        amount = self.amounts.get(node)
        for kind in amount.kinds if amount is not None else ():
            if kind in self.seen:
                seconds, passes = self.seen[kind]
                return amount.passes * seconds / passes if amount is not None else None
        return None

    def left(
        self, ended: Collection[str], failed: Iterable[str], at_work: Mapping[str, float | None], abreast: float
    ) -> Left | None:
        """The time left: the longest chain of nodes, or the work of all over the nodes that run side by side.

        Args:
            ended: nodes that are there.
            failed: nodes that are not made; nor are those that need them.
            at_work: node → seconds that it still takes, where it shows them itself.
            abreast: nodes that ran side by side so far, on average.

        Returns:
            None if nothing is known.
        """
        lost, ends, total, least = set(failed), dict[str, float](), 0.0, False
        for node, inputs in self.inputs.items():
            if node in ended or node in lost:
                continue
            if lost.intersection(inputs):
                lost.add(node)
                continue
            rest = at_work.get(node)
            rest = self.expected(node) if rest is None else rest
            least = least or rest is None
            ends[node] = max((ends.get(parent, 0.0) for parent in inputs), default=0.0) + (rest or 0.0)
            total += rest or 0.0
        seconds = max([total / max(abreast, 1.0), *ends.values()])
        return Left(seconds, least) if seconds else None


def _amount(status: NodeStatus, known: Mapping[str, NodeStatus]) -> Amount | None:
    """A node's work that is left; None where it is not known before its images are there."""
    source, job = source_of(status.node), status.job
    if isinstance(job, UsefulnessJob) or (status.node.inputs and known[source.id].facts["image_shape"] is None):
        return None  # the features of a network are counted by building it, which may be the user's code
    shards: Mapping[str, int] = status.facts.get("shards", {})
    share = 1 - status.partial / len(shards) if shards else 1.0
    works = job.parts(shards, known[source.id].facts)
    passes = sum(map(_passes, works)) or float(sum(shards.values()))
    like = digest(b"".join(sorted(work.part.key for work in works)))
    searches = any(work.part.steps > 0 for work in works)  # a plain copy tells nothing of a search's speed
    return Amount((like, f"{status.node.stage}, searching" if searches else status.node.stage), share * passes)


def _passes(work: Work) -> float:
    return float(sum(work.batches) * work.part.batch * max(1, work.part.steps))
