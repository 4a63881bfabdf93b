"""One training on several workers: a Ray Train group in which each process runs the same loop on its share.

Ray Train starts the processes, joins them (NCCL on GPUs, Gloo on CPUs), and ends them all when one is lost.
Checkpoints are our own, in the store: any number of workers can resume from them.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.run.jobs import TrainJob
from pipeline.run.parcel import unpack
from stages.errors import BadData, BadInput

BEGAN: dict[str, Any] = {}
"""What a training yields first, as its processes begin to work: until then it waits for room on the cluster."""

POLL = 1.0
"""Seconds between two checks whether the group is still running."""

SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # the user's modules may read files in their folder
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an extra process for checkpoints, which we write ourselves
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # then count the nodes again: one may be gone
}
"""Ray Train reads them from the environment of the process that starts a group."""


def steps(pickled_job: bytes, gpu: bool) -> Iterator[dict[str, Any]]:
    """Make a model with a group of processes; yields `BEGAN`, then the same as ``TrainJob.steps``.

    Called in a Ray task that reserves nothing: the group's processes are its children and die with it. The group has as
    many processes as fit on the cluster, up to the job's ``workers``; when that number changes, it restarts from the
    last checkpoint. The loss of a process ends the attempt, and the next call resumes.

    Args:
        pickled_job: the training, as bytes of `parcel.pack`.
        gpu: whether each process gets a GPU.

    Raises:
        BadInput, BadData: raised by a process; a retry would not help.
        RuntimeError: a process was lost, or failed in another way.
    """
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    os.environ.update(SETTINGS)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    reported = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    # Not in the main thread, where Ray Train would replace the SIGINT handler.
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as pool:
        done = pool.submit(_fit, pickled_job, gpu, reported, scratch)
        made = False
        try:
            for metrics in _reports(reported, done):
                made = made or "manifest" in metrics
                yield metrics
        finally:
            reported.shutdown(force=True)  # without its queue, a group ends after its epoch
    if not made:  # after publication, errors of the group do not matter
        done.result()


def _reports(reported: Any, done: "Future[None]") -> Iterator[dict[str, Any]]:
    """The metrics that the group reports until it ends."""
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
    """Release the reservations of groups whose controller was killed: otherwise ours would wait for them forever.

    Ray frees them when the whole job ends; Ray Train frees them only with a dashboard, which a local cluster lacks.
    Ray's public table of reservations does not list their owners. (A killed group's requests to Ray's autoscaling
    coordinator expire after three minutes.)
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
            num_workers=(1, job.workers),  # type: ignore[arg-type]  # the stubs describe Ray Train before v2
            use_gpu=gpu,
            resources_per_worker=_resources(job, gpu),
        ),
        # No retries here: the engine retries, counts and reports. The scratch folder keeps nothing.
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
    if context.get_world_rank() == 0:
        config["reported"].put(BEGAN)
    for metrics in unpack(config["pickled_job"]).train(Group(context.get_world_rank(), context.get_world_size())):
        config["reported"].put(metrics)


def _resources(job: TrainJob, gpu: bool) -> dict[str, float]:
    """The resources of a process: a CPU per thread, or fewer if the group would not fit otherwise."""
    import ray

    if gpu:
        return {"CPU": 1, "GPU": 1}
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    fitting = (cpus for cpus in range(job.threads, 0, -1) if sum(node // cpus for node in nodes) >= job.workers)
    return {"CPU": next(fitting, 1)}


def _plain(error: Exception) -> Exception:
    """The cause of a group's failure: the error of one of its processes, or the loss of one.

    After a loss the other processes fail too, since they wait for the lost one; their errors are left out.
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
