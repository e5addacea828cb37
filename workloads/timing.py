"""How long a server may take to start and to stop: pure arithmetic from the plan, the same for probes and for vLLM."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from planner.plan.serving import Serving

PROBE_SECONDS = 10  # between two looks of the startup and liveness probes
LEAST_DRAIN_SECONDS = 30
KILL_SECONDS = 10  # between vLLM's own end and the machine's patience: processes and the GPU's memory are let go


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


def _up_to(seconds: float, step: int) -> int:
    return ceil(seconds / step) * step
