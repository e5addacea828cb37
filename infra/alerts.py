"""What is worth waking somebody for: Prometheus rules over what the cluster's exporters say, as plain data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from planner.errors import PlannerError
from planner.units import MIB

# Every metric that a rule may use, by who exports it. A rule on any other would stay silent for ever.
SCRAPED: Mapping[str, tuple[str, ...]] = {
    # kept by managed Prometheus's minimal ingestion profile; source: Azure/prometheus-collector,
    # tomlparser-default-targets-metrics-keep-list.go, and Microsoft's prometheus-metrics-scrape-default.md of
    # 2025-09-10; as_of 2026-11-22
    "kube-state-metrics": (
        "kube_deployment_spec_replicas",
        "kube_deployment_status_replicas_available",
        "kube_job_failed",
        "kube_job_status_active",
        "kube_job_status_start_time",
        "kube_node_info",
        "kube_node_status_capacity",
        "kube_node_status_condition",
        "kube_pod_container_resource_requests",
        "kube_pod_status_phase",
    ),
    # in the exporter's own list of counters; source: NVIDIA/dcgm-exporter, etc/default-counters.csv; as_of 2026-11-22
    "dcgm-exporter": ("DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_XID_ERRORS"),
    # source: vLLM 0.32.0, vllm/v1/metrics/loggers.py; as_of 2026-11-22
    "vllm": ("vllm:kv_cache_usage_perc", "vllm:num_requests_waiting", "vllm:time_to_first_token_seconds_bucket"),
}

# XID errors after which the program is to be restarted, if anything: its exceptions 13 and faults 31, 43 of which the
# driver took notice, 45 where its work was removed
# source: NVIDIA, Xid Catalog, https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html; as_of 2026-11-22
PROGRAM_XIDS = (13, 31, 43, 45)

IDLE_PERCENT, IDLE_MINUTES = 5, 30
PENDING_MINUTES = 20  # what a GPU machine takes at most to come, with its driver and the image
KV_CACHE_FULL = Decimal("0.95")

ERROR, WARNING, INFORMATION = 1, 2, 3  # of Azure Monitor's five severities

GPU_REQUESTS = "pod:gpu_requests:sum"
GPU_UTILIZATION = "pod:gpu_utilization_percent:max"
GPU_MEMORY = "pod:gpu_memory_used_bytes:max"


@dataclass(frozen=True)
class Watched:
    """A workload as its alerts see it.

    name: of its Deployment, or what the names of its Jobs begin with; pods are called after both
    gpu_memory_bytes: more than this on one GPU contradicts the plan; deadline_seconds: of a Job, from its start.
    None: not watched
    """

    name: str
    task: Literal["serve", "train"]
    gpu_memory_bytes: int | None = None
    deadline_seconds: int | None = None


@dataclass(frozen=True)
class Watch:
    """What the rules watch.

    pool_minimums: machines that a pool always has; start_minutes: until a server may be expected to answer
    waiting_requests: more than this per engine is a queue that servers do not keep up with
    first_token_seconds: what 95 of 100 requests may wait for their first token; None: not promised, not watched
    """

    namespace: str
    workloads: Sequence[Watched]
    pool_minimums: Mapping[str, int]
    start_minutes: int = 30
    waiting_requests: int = 10
    first_token_seconds: Decimal | None = None


@dataclass(frozen=True)
class Recording:
    """An expression that is stored as a series of its own."""

    name: str
    expression: str


@dataclass(frozen=True)
class Alert:
    """An expression that should have no result, how many minutes it may have one, and what to do then."""

    name: str
    expression: str
    minutes: int
    severity: int
    summary: str
    action: str


@dataclass(frozen=True)
class RuleGroup:
    """Rules that are evaluated one after another, once a minute. Azure takes 20 in a group."""

    name: str
    about: str
    rules: tuple[Recording | Alert, ...]


def rule_groups(watch: Watch) -> tuple[RuleGroup, ...]:
    """The rules for what is watched; groups that would be empty are left out.

    PlannerError for a name that is not Kubernetes's, a limit that is not above zero, and two workloads of one name.
    """
    _check(watch)
    servers = [workload for workload in watch.workloads if workload.task == "serve"]
    trainings = [workload for workload in watch.workloads if workload.task == "train"]
    groups = [_gpus(watch)]
    if servers:
        groups.append(_serving(watch, servers))
    if trainings:
        groups.append(_training(watch, trainings))
    return (*groups, _cluster(watch))


def _check(watch: Watch) -> None:
    names = [workload.name for workload in watch.workloads]
    for name in (watch.namespace, *names, *watch.pool_minimums):
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name):
            raise PlannerError(
                f"{name[:100]!r} cannot be watched: Kubernetes's names are lower-case letters, digits and hyphens"
            )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise PlannerError(f"two workloads are called {twice[0]}, and no alert could tell them apart: rename one")
    limits = [watch.start_minutes, watch.waiting_requests]
    limits += [least for least in (w.gpu_memory_bytes for w in watch.workloads) if least is not None]
    limits += [least for least in (w.deadline_seconds for w in watch.workloads) if least is not None]
    if min(limits) <= 0 or (watch.first_token_seconds is not None and watch.first_token_seconds <= 0):
        raise PlannerError("an alert's limit must be above zero: leave out what is not to be watched")


def _gpus(watch: Watch) -> RuleGroup:
    xid = "max by (cluster, Hostname, gpu, UUID) (DCGM_FI_DEV_XID_ERRORS)"
    by_program = " or ".join(f"{xid} == {number}" for number in PROGRAM_XIDS)
    elsewhere = "".join(f" != {number}" for number in PROGRAM_XIDS)
    limits = [(workload, workload.gpu_memory_bytes) for workload in watch.workloads if workload.gpu_memory_bytes]
    above = " or ".join(
        f'{GPU_MEMORY}{{namespace="{watch.namespace}", {_called("pod", workload.name, watch)}}} > {limit}'
        for workload, limit in limits
    )
    rules: list[Recording | Alert] = [
        Recording(
            GPU_REQUESTS,
            'sum by (cluster, namespace, pod) (kube_pod_container_resource_requests{resource=~"(nvidia|amd)_com_.+"})',
        ),
        Recording(GPU_UTILIZATION, _of_pods("DCGM_FI_DEV_GPU_UTIL")),
        Recording(GPU_MEMORY, f"{MIB} * {_of_pods('DCGM_FI_DEV_FB_USED')}"),
        Alert(
            "GpuFault",
            f"{xid} > 0{elsewhere}",
            1,
            ERROR,
            "GPU {{ $labels.gpu }} of {{ $labels.Hostname }} reported XID {{ $value }}",
            "Look the number up in NVIDIA's list of XID errors. Cordon and drain the node, then delete its machine from"
            " the pool: the autoscaler brings another. The alert ends with the node.",
        ),
        Alert(
            "GpuProgramFault",
            by_program,
            1,
            WARNING,  # no less: 45 also follows a fault of the GPU, and the exporter shows only the last number
            "A program failed on GPU {{ $labels.gpu }} of {{ $labels.Hostname }}, XID {{ $value }}",
            "Read the log of the pod that ran there: 13, 31, 43 and 45 come from programs that crash or are stopped. 45"
            " also follows other errors: when the node's kernel log shows another XID before it, or other programs fail"
            " there too, drain the node. The alert ends with the exporter's pod.",
        ),
        Alert(
            "GpuIdle",
            f"{GPU_UTILIZATION} < {IDLE_PERCENT}",
            IDLE_MINUTES,
            INFORMATION,
            "{{ $labels.namespace }}/{{ $labels.pod }} holds GPUs that do nothing: {{ $value }} % busy",
            "Each hour is billed. Give the workload a schedule in the intent, or delete the pod's Deployment or Job:"
            " its node goes when no pod needs it.",
        ),
        Alert(
            "GpuMetricsMissing",
            'count by (cluster) (kube_node_status_capacity{resource="nvidia_com_gpu"} > 0)'
            " unless on (cluster) count by (cluster) (DCGM_FI_DEV_GPU_UTIL)",
            15,
            WARNING,
            "{{ $value }} nodes have GPUs and none reports how they are",
            "No alert on GPUs can fire until this is repaired. Look at the pods and the PodMonitor of dcgm-exporter,"
            " and at the pods ama-metrics in kube-system.",
        ),
    ]
    if limits:
        rules.append(
            Alert(
                "GpuMemoryAboveReceipt",
                above,
                5,
                WARNING,
                "{{ $labels.pod }} uses {{ $value | humanize1024 }}B of a GPU, more than the plan's receipt says",
                "The next larger batch or longer context may run out of memory. Compare with the receipt of"
                " `planner plan`, then lower the context or the concurrency in the intent, or plan a larger GPU.",
            )
        )
    return RuleGroup("gpus", "GPUs: faults, idle time, memory", tuple(rules))


def _serving(watch: Watch, servers: Sequence[Watched]) -> RuleGroup:
    here = f'namespace="{watch.namespace}"'
    names = "|".join(workload.name for workload in servers)
    deployments = f'{here}, deployment=~"{names}"'
    by_model = "cluster, namespace, model_name"
    wanted = f"sum by (cluster, namespace, deployment) (kube_deployment_spec_replicas{{{deployments}}}) > 0"
    available = (
        f"sum by (cluster, namespace, deployment) (kube_deployment_status_replicas_available{{{deployments}}}) > 0"
    )
    rules: list[Recording | Alert] = [
        Alert(
            "ServerNotReady",
            f"{wanted} unless on (cluster, namespace, deployment) {available}",
            watch.start_minutes,
            ERROR,
            "{{ $labels.deployment }} should have {{ $value }} replicas and none is ready",
            "kubectl describe pod and kubectl logs of its pods say why: no machine (quota, spot), weights that do not"
            " load, too little GPU memory, or a probe that is too impatient.",
        ),
        Alert(
            "ServerMetricsMissing",
            f"sum by (cluster, namespace) (kube_deployment_status_replicas_available{{{deployments}}}) > 0"
            f" unless on (cluster, namespace) count by (cluster, namespace) (vllm:num_requests_waiting{{{here}}})",
            15,
            WARNING,
            "{{ $value }} replicas serve and none reports its queue",
            "No alert on requests can fire until this is repaired. Look at the servers' PodMonitor and at the network"
            " policy that lets kube-system reach their port.",
        ),
        Alert(
            "RequestsWaiting",
            f"avg by ({by_model}) (vllm:num_requests_waiting{{{here}}}) > {watch.waiting_requests}",
            10,
            WARNING,
            "{{ $value }} requests wait per engine of {{ $labels.model_name }}",
            "The servers get more than they can do. Raise the concurrency or the replicas in the intent and plan again,"
            " or let callers slow down.",
        ),
        Alert(
            "KvCacheAlmostFull",
            f"max by (cluster, namespace, pod, model_name) (vllm:kv_cache_usage_perc{{{here}}}) > {KV_CACHE_FULL}",
            15,
            INFORMATION,
            "{{ $labels.pod }} has {{ $value | humanizePercentage }} of its KV cache in use",
            "vLLM takes requests out of the batch and computes them again when it runs out. Lower max-num-seqs or the"
            " context, store the cache in FP8, or plan another replica.",
        ),
    ]
    if watch.first_token_seconds is not None:
        rules.append(
            Alert(
                "FirstTokenLate",
                f"histogram_quantile(0.95, sum by ({by_model}, le)"
                f" (rate(vllm:time_to_first_token_seconds_bucket{{{here}}}[10m]))) > {watch.first_token_seconds}",
                10,
                WARNING,
                "5 of 100 requests to {{ $labels.model_name }} wait {{ $value | humanizeDuration }} or longer to begin",
                "Prompts are longer or more at once than planned. Look at RequestsWaiting; enable prefix caching, or"
                " add a replica in the intent and plan again.",
            )
        )
    return RuleGroup("serving", "Servers: readiness, queue, KV cache", tuple(rules))


def _training(watch: Watch, trainings: Sequence[Watched]) -> RuleGroup:
    here = f'namespace="{watch.namespace}"'
    by_job = "by (cluster, namespace, job_name)"

    def jobs(workload: Watched) -> str:
        return f"{here}, {_called('job_name', workload.name, watch)}"

    failed = " or ".join(
        f'max {by_job} (kube_job_failed{{{jobs(workload)}, condition="true"}}) > 0' for workload in trainings
    )
    late = " or ".join(
        f"(time() - max {by_job} (kube_job_status_start_time{{{jobs(workload)}}}) > {workload.deadline_seconds}"
        f" and on (cluster, namespace, job_name) max {by_job} (kube_job_status_active{{{jobs(workload)}}}) > 0)"
        for workload in trainings
        if workload.deadline_seconds is not None
    )
    rules: list[Recording | Alert] = [
        Alert(
            "TrainingFailed",
            failed,
            1,
            ERROR,
            "{{ $labels.job_name }} has given up",
            "kubectl logs of its last pod says why. Its newest checkpoint is in the container checkpoints: mend the"
            " cause, delete the Job, make it again with `pulumi up`, and start it: it goes on from there.",
        )
    ]
    if late:
        rules.append(
            Alert(
                "TrainingLate",
                late,
                1,
                WARNING,
                "{{ $labels.job_name }} has run {{ $value | humanizeDuration }}, longer than the plan says",
                "Each hour more is billed above the plan. Compare the steps done in its log with the plan's throughput;"
                " evictions, a slow dataset or a smaller batch make it late. Delete the Job to stop the cost.",
            )
        )
    return RuleGroup("training", "Training jobs: failure, deadline", tuple(rules))


def _cluster(watch: Watch) -> RuleGroup:
    pending = 'max by (cluster, namespace, pod) (kube_pod_status_phase{phase="Pending"}) > 0'
    least = {pool: count for pool, count in watch.pool_minimums.items() if count > 0}
    # a pool without machines has no series at all: zero stands in, as long as any node is reported
    short = " or ".join(
        f"label_replace((count by (cluster) (kube_node_info{{{_nodes_of(pool)}}})"
        f' or 0 * max by (cluster) (kube_node_info)) < {count}, "pool", "{pool}", "", "")'
        for pool, count in least.items()
    )
    rules: list[Recording | Alert] = [
        Alert(
            "GpuPodPending",
            f"{pending} and on (cluster, namespace, pod) {GPU_REQUESTS} > 0",
            PENDING_MINUTES,
            WARNING,
            "{{ $labels.namespace }}/{{ $labels.pod }} has waited for a GPU for more than"
            f" {PENDING_MINUTES} minutes",
            "kubectl describe pod shows what the autoscaler tried. Usual causes: the quota of the size's family is used"
            " up, Azure has no spot machine left, or the pool is at its maximum.",
        ),
        Alert(
            "NodeNotReady",
            'max by (cluster, node) (kube_node_status_condition{condition="Ready", status="true"}) == 0',
            10,
            WARNING,
            "Node {{ $labels.node }} is not ready",
            "kubectl describe node says since when and why. A machine that does not come back is replaced by"
            " deleting it from its pool.",
        ),
    ]
    if least:
        rules.append(
            Alert(
                "PoolBelowMinimum",
                short,
                15,
                WARNING,
                "Pool {{ $labels.pool }} has {{ $value }} machines, fewer than its minimum",
                "Spot machines were taken back, or Azure has none of this size. The fallback pool should have taken the"
                " work; if not, look at the quota, or allow another region or size in the intent.",
            )
        )
    return RuleGroup("cluster", "Cluster: nodes, pools, pods without a machine", tuple(rules))


def _of_pods(metric: str) -> str:
    """The largest value over the GPUs of each pod that asked for one.

    The exporter's labels of the pod that holds a GPU arrive as exported_pod where the scrape's own labels win, as pod
    where the exporter's are honoured; both are read. In the second case GPUs that nobody holds carry the exporter's
    own pod, which asked for no GPU.
    """
    renamed = f'{metric}{{exported_pod!=""}}'
    for label in ("namespace", "pod"):
        renamed = f'label_replace({renamed}, "{label}", "$1", "exported_{label}", "(.+)")'
    held = f'max by (cluster, namespace, pod) ({renamed} or {metric}{{exported_pod="", pod!=""}})'
    return f"({held} and on (cluster, namespace, pod) {GPU_REQUESTS} > 0)"


def _called(label: str, name: str, watch: Watch) -> str:
    """Matches what is called after that workload, and not what is called after one whose longer name begins so."""
    longer = [workload.name for workload in watch.workloads if workload.name.startswith(f"{name}-")]
    besides = f', {label}!~"({"|".join(longer)})-.+"' if longer else ""
    return f'{label}=~"{name}(-.+)?"{besides}'


def _nodes_of(pool: str) -> str:
    """AKS calls the machines of a Linux pool aks-POOL-NUMBER-vmssCOUNTER."""
    return f'node=~"aks-{pool}-[0-9]+-vmss.+"'
