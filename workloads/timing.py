"""How long a workload may take to start, to stop and to end: pure arithmetic from the plan."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from planner.plan.lock import LockedWorkload
from planner.plan.serving import Serving
from planner.plan.training import Training

PROBE_SECONDS = 10  # between two looks of the startup and liveness probes
LEAST_DRAIN_SECONDS = 30
KILL_SECONDS = 10  # between a program's own end and the machine's patience: processes and the GPU's memory are let go
UNKNOWN_MICRO_BATCH_SECONDS = 120  # of a run whose speed no formula covers
DEADLINE_FACTOR = 2  # a run that hangs must not cost a month, and one that waits for machines must not end


class ServingTiming(NamedTuple):
    """A server's times in whole seconds.

    start_seconds: from its container's start to its first answer, at most; start_failures: looks of the startup probe
    pre_stop_seconds: in which it still takes requests; shutdown_seconds: of vLLM's --shutdown-timeout
    grace_seconds: until Kubernetes kills it; deadline_seconds: until a rollout counts as failed
    """

    start_seconds: int
    start_failures: int
    pre_stop_seconds: int
    shutdown_seconds: int
    grace_seconds: int
    deadline_seconds: int


def serving_timing(serving: Serving) -> ServingTiming:
    """When a server must have started, and how long it may take to stop.

    start = stored_bytes / read_bytes_per_second + engine_seconds, up to whole minutes
    shutdown = answer_tokens * token_seconds, at least half a minute
    grace = endpoint_seconds + shutdown + 10; deadline = machine_seconds + start
    """
    start = _up_to(serving.stored_bytes / serving.read_bytes_per_second + serving.engine_seconds, 60)
    drain = max(ceil(serving.answer_tokens * serving.token_seconds), LEAST_DRAIN_SECONDS)
    return ServingTiming(
        start_seconds=start,
        start_failures=start // PROBE_SECONDS,
        pre_stop_seconds=serving.endpoint_seconds,
        shutdown_seconds=drain,
        grace_seconds=serving.endpoint_seconds + drain + KILL_SECONDS,
        deadline_seconds=serving.machine_seconds + start,
    )


class TrainingTiming(NamedTuple):
    """A run's times in whole seconds.

    grace_seconds: from SIGTERM until Kubernetes kills it; deadline_seconds: of its Job from the start, waiting included
    """

    grace_seconds: int
    deadline_seconds: int


def training_timing(workload: LockedWorkload, training: Training) -> TrainingTiming:
    """How long a run may take to stop with a checkpoint, and in all.

    grace = micro batch + save_seconds + 2 x checkpoint_bytes / write_bytes_per_second (disk, then Blob) + 10
    deadline = 2 x hours_per_month
    """
    micro = UNKNOWN_MICRO_BATCH_SECONDS if training.micro_batch_seconds is None else training.micro_batch_seconds
    save = training.save_seconds + 2 * workload.checkpoint_bytes / training.write_bytes_per_second
    return TrainingTiming(
        grace_seconds=_up_to(float(micro) + save + KILL_SECONDS, 10),
        deadline_seconds=int(workload.hours_per_month * DEADLINE_FACTOR * 3600),
    )


def _up_to(seconds: float, step: int) -> int:
    return ceil(seconds / step) * step
