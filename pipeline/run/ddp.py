"""One training on several workers: a Ray Train group in which each process runs the same loop on its share.

Ray Train starts the processes, joins them (NCCL on GPUs, gloo on processors), and ends them all when one is
lost. Checkpoints are ours, in the store: any number of workers goes on from them.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.run.jobs import TrainJob
from pipeline.run.parcel import unpack
from stages.errors import BadData, BadInput

POLL = 1.0
"""Seconds between two looks at whether the group is still there."""

SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # the user's modules may read files of the folder they are in
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one more process, for checkpoints that we write anyway
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # then the nodes are counted again: one may have gone
}
"""Ray Train reads them from the environment of the process that starts a group."""


def steps(pickled_job: bytes, gpu: bool) -> Iterator[dict[str, Any]]:
    """Make a model with a group of processes; yields what ``TrainJob.steps`` yields.

    For a Ray task that reserves nothing: the group's processes are its children and die with it. There are as
    many as the cluster has room for, up to the job's ``workers``; when that changes, the group begins again
    from the last checkpoint. When one is lost the attempt ends, and the next call goes on from there.

    Args:
        pickled_job: the training, as `parcel.pack` sends it.
        gpu: whether each process gets a GPU.

    Raises:
        BadInput, BadData: a process raised it; trying again would not help.
        RuntimeError: a process was lost, or failed in another way.
    """
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    os.environ.update(SETTINGS)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    reported = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    # Not in the main thread: there Ray Train would put a handler of its own in the place of SIGINT's.
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as pool:
        done = pool.submit(_fit, pickled_job, gpu, reported, scratch)
        made = False
        try:
            for metrics in _reports(reported, done):
                made = made or "manifest" in metrics
                yield metrics
        finally:
            reported.shutdown(force=True)  # a group whose queue is gone ends with its epoch
    if not made:  # once published, later errors of the group do not matter
        done.result()


def _reports(reported: Any, done: "Future[None]") -> Iterator[dict[str, Any]]:
    """The metrics that the group reports, until it has ended."""
    from ray.util.queue import Empty

    while True:
        ended = done.done()
        try:
            yield reported.get(timeout=POLL)
        except Empty:
            if ended:
                return
            _free_what_dead_groups_hold()


def _free_what_dead_groups_hold() -> None:
    """Release the reservations of groups whose controller was killed: otherwise ours would wait for them for ever.

    Ray frees them when the whole job ends, Ray Train only where there is a dashboard to ask, and a local
    cluster has none. Ray's public table of them does not say who made them. (What a killed group has put
    down with Ray's autoscaling coordinator lapses by itself, after three minutes.)
    """
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    for row in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        held = group.state != PlacementGroupTableData.REMOVED
        if held and group.creator_actor_dead and group.creator_job_id.hex() == job:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def _fit(pickled_job: bytes, gpu: bool, reported: Any, scratch: str) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    job: TrainJob = unpack(pickled_job)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"pickled_job": pickled_job, "reported": reported},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(1, job.workers),  # type: ignore[arg-type]  # the stubs are those of Ray Train before v2
            use_gpu=gpu,
            resources_per_worker=_resources(job, gpu),
        ),
        # No failure is retried here: the engine does it, counts, and says so. Nothing is kept in the scratch.
        run_config=RunConfig(name="group", storage_path=scratch, failure_config=FailureConfig(max_failures=0)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _plain(error) from error


def _work(config: dict[str, Any]) -> None:
    """The training loop of each process of the group."""
    from ray import train

    from stages.train import Group

    context = train.get_context()
    for metrics in unpack(config["pickled_job"]).train(Group(context.get_world_rank(), context.get_world_size())):
        config["reported"].put(metrics)


def _resources(job: TrainJob, gpu: bool) -> dict[str, float]:
    """The resources of a process: a processor per thread, or fewer if the group would not fit otherwise."""
    import ray

    if gpu:
        return {"CPU": 1, "GPU": 1}
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    fitting = (cpus for cpus in range(job.threads, 0, -1) if sum(node // cpus for node in nodes) >= job.workers)
    return {"CPU": next(fitting, 1)}


def _plain(error: Exception) -> Exception:
    """Why a group failed, in a sentence: what one of its processes raised, or how one was lost.

    If one is lost the others fail too, since they wait for it: their errors are left out.
    """
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        if isinstance(failure, BadData | BadInput):
            return failure
    for rank, failure in failures.items():
        if hasattr(failure, "health_check_failure"):
            reason = str(failure).partition(" because ")[2].partition(". ")[0]
            return RuntimeError(f"worker {rank} was lost: {reason or 'it does not answer'}")
    for rank, failure in failures.items():
        first = (str(failure).strip().splitlines() or [""])[0]
        return RuntimeError(f"worker {rank} failed: {type(failure).__name__}: {first}")
    return error
