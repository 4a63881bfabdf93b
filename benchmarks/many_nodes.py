"""Time and peak memory of finding things in a store of many nodes, each command in a process of its own (Linux only).

The store is synthetic: manifests, recipes and records of runs are those that runs write, but tars and weights hold only
their own names, since none of these commands reads them. Experiments share a clean dataset and a source model; each has
four attacked datasets, a model trained on each, and three evaluations, and was run once.

    python -m benchmarks.many_nodes
    python -m benchmarks.many_nodes --nodes 40 --samples 50000 --rounds 1     # a look
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.side_by_side import highest, in_turns, machine, show, spread
from pipeline.experiment.graph import Node, build
from pipeline.experiment.spec import Experiment, parse
from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from pipeline.run.fingerprints import SCHEMA
from pipeline.run.jobs import Context
from pipeline.run.runs import Record
from pipeline.store import Store, digest
from stages.design import Design

SHARD = 1000
"""Samples of a shard."""

LOOK = 0.01
"""Seconds between two looks at a process's memory."""


def experiment(number: int) -> dict[str, Any]:
    """An experiment whose datasets, models and evaluations are versions of the same names."""
    names = [f"moved{i}" for i in range(4)]
    attack = {"images": "clean", "model": "standard", "eps": 0.5 + number / 1000, "steps": 100}
    train = {"arch": "resnet9", "epochs": 40}
    evaluations = {f"of_{name}": {"models": [f"from_{name}"], "on": "clean", "split": "train"} for name in names[:3]}
    return {
        "name": "many",
        "datasets": {
            "clean": {"load": {"source": "synthetic", "images": {"train": SHARD}, "classes": 10, "size": 32}},
            **{name: {"attack": attack, "relabel": {"rule": "other", "seed": i}} for i, name in enumerate(names)},
        },
        "models": {
            "standard": {"train": {"on": "clean", **train}},
            **{f"from_{name}": {"train": {"on": name, **train}} for name in names},
        },
        "evaluations": evaluations,
    }


def publish(store: Store, node: Node, shards: int, made: dict[str, Artifact]) -> Artifact:
    """Write a finished node with as many shards."""
    names = [f"train-{i:06d}" for i in range(shards)]
    contents = {"recipe.json": store.put_json(f"{node.folder}/recipe.json", node.described())}
    if node.group == "evaluations":
        contents["result.json"] = store.put_json(f"{node.folder}/result.json", {"rows": []})
    elif node.group == "models":
        contents |= {"weights.safetensors": node.folder.encode(), "metrics.jsonl": b'{"accuracy": 0.5}\n'}
    else:
        contents |= {f"{name}.tar": f"{node.folder}/{name}".encode() for name in names} | {"samples.parquet": b""}
    for name, content in contents.items():
        store.put(f"{node.folder}/{name}", content)
    shas = {name: digest(content) for name, content in contents.items()}
    tars = {name: sha for name, sha in shas.items() if name.endswith(".tar")}
    content = artifacts.content_digest(tars) if tars else shas.get("weights.safetensors", shas["recipe.json"])
    files = {name: (len(contents[name]), sha) for name, sha in shas.items()}
    inputs = {role: made[one.id] for role, one in node.inputs.items()}
    return artifacts.publish(store, node, files, content, inputs, SCHEMA.empty_table(), facts(node, names))


def facts(node: Node, names: list[str]) -> dict[str, Any]:
    """What a manifest says about a node of its kind, beside files and inputs."""
    computed = {"devices": {"cpu": len(names)}, "settings": {}}
    if node.group == "models":
        design = Design(node.recipe.arch, 10, (3, 32, 32), (0.5,) * 3, (0.2,) * 3)
        return computed | {"design": design.as_json(), "trained_on": node.inputs["on"].name}
    computed |= {"shards": dict.fromkeys(names, SHARD)}
    if node.group == "evaluations":
        return computed
    return computed | {
        "classes": [str(i) for i in range(10)],
        "channels": 3,
        "image_shape": [3, 32, 32],
        "members": ["png", "cls", "json"],
        "counts": {"train": SHARD * len(names)},
        "failures": 0,
        "success_rate": 0.9,
        "l2_mean": 0.4,
        "linf_max": 0.1,
    }


def fill(store: Store, nodes: int, samples: int) -> int:
    """Write experiments, each with the record of a run, until the store has so many nodes; returns their samples.

    The clean dataset has a tenth of the samples, and the attacked ones share the rest.
    """
    clean = max(samples // 10 // SHARD, 1)
    attacked = sum(node.stage == "attack" for node, _ in _nodes(nodes))
    shards, extra = divmod(max(samples // SHARD - clean, 0), max(attacked, 1))
    made: dict[str, Artifact] = {}
    total, recorded = 0, None
    for node, one in _nodes(nodes):
        if one is not recorded:
            recorded = one
            record(store, one)
        more = node.stage == "attack" and extra > 0
        extra -= more
        count = clean if node.stage == "load" else max(shards + more, 1) if node.stage == "attack" else 1
        made[node.id] = publish(store, node, count, made)
        total += count * SHARD if node.group == "datasets" else 0
    return total


def record(store: Store, one: Experiment) -> None:
    """Write the record of a run that made an experiment."""
    run = Record(Context(store, Path("data"), Path()), one, (), build(one), lambda *_: None)
    for progress in run.nodes.values():
        progress.state = "done"
    run.end("done")


def _nodes(most: int) -> Iterator[tuple[Node, Experiment]]:
    """The nodes of one experiment after the other, each once, with its experiment."""
    seen, number = set[str](), 0
    while True:
        one = parse(experiment(number))
        for node in build(one):
            if node.folder not in seen:
                seen.add(node.folder)
                yield node, one
                if len(seen) == most:
                    return
        number += 1


class Took(NamedTuple):
    """Seconds on the clock, seconds of CPU, peak MiB and bytes of output of a command."""

    seconds: float
    cpu: float
    peak: float
    output: int


def command(*args: str) -> Took:
    """Run a command in a process of its own, including the start of Python."""
    started, before, peak = time.perf_counter(), _children(), 0.0
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, "-m", "pipeline", *args], stdout=out)
        while process.poll() is None:
            peak = max(peak, highest(process.pid))
            time.sleep(LOOK)
        assert process.returncode == 0, args
        return Took(time.perf_counter() - started, _children() - before, peak, out.tell())


def _children() -> float:
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@click.command()
@click.option("--nodes", default=1000, show_default=True)
@click.option("--samples", default=1_300_000, show_default=True, help="Of all datasets together.")
@click.option("--rounds", default=3, show_default=True)
def main(nodes: int, samples: int, rounds: int) -> None:
    """Measure ls, show, log, a dry gc and index on a store of many nodes, beside a command that reads no store."""
    asked = [
        "--help",
        "ls",
        "ls --json",
        "show moved0",
        "log clean",
        "log from_moved0",
        "gc --keep 1 --dry-run",
        "index",
    ]
    took: dict[str, list[Took]] = {name: [] for name in asked}
    with tempfile.TemporaryDirectory() as folder:
        total = fill(Store(folder), nodes, samples)

        def run(name: str) -> float:
            took[name].append(command(*name.split(), *(["--store", folder] if name != "--help" else [])))
            return took[name][-1].seconds

        in_turns({name: lambda _, name=name: run(name) for name in asked}, rounds)
    click.echo(f"{machine('pyarrow', 'pydantic')}\n{nodes:,} nodes, {total:,} samples, {rounds} rounds")
    lines = [
        [
            f"notbugs {name}",
            spread([one.seconds for one in each], 2),
            spread([one.cpu for one in each], 2),
            f"{max(one.peak for one in each):.0f}",
            f"{each[0].output:,}",
        ]
        for name, each in took.items()
    ]
    show("A store of many nodes, in a folder", ["", "seconds", "CPU seconds", "peak MiB", "bytes of output"], lines)


if __name__ == "__main__":
    main()
