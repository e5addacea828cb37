"""Where every value of a workload's manifests comes from: a line each, for `planner render --explain`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from planner.plan.lock import Lock, LockedWorkload
from planner.units import format_gib
from workloads import server, training
from workloads.arguments import explained_arguments, serving_of
from workloads.finetune import INTERRUPTED, REFUSED
from workloads.finetune.from_plan import training_of
from workloads.pods import ALL_SECRETS, GPU, NEEDED_SECRETS, disk_of, place, resources, secrets_of
from workloads.timing import DEADLINE_FACTOR, LEAST_DRAIN_SECONDS, PROBE_SECONDS, serving_timing, training_timing


class Explained(NamedTuple):
    """A value of a manifest and its reason. part: argument, run, setting, probe, stop, retry, place, storage ..."""

    part: str
    value: str
    why: str


def explain(lock: Lock, workload: LockedWorkload, secrets: Collection[str] = ALL_SECRETS) -> list[Explained]:
    """Every argument, probe and limit of a workload, in the order of its manifest."""
    why = "pinned by platform.json when the plan was made"
    if workload.task == "finetune":
        why = "built in the stack's registry from infra/images/train, its tag made of what it is built from"
    found = [Explained("image", _image(lock, workload), why)]
    if workload.task == "serve":
        guarded = server.is_guarded(secrets)
        found += [
            Explained("argument", " ".join(one.words), one.why)
            for one in explained_arguments(workload, guarded=guarded)
        ]
        machines = serving_of(workload).machines
        if machines > 1:
            words = " ".join(server.group(machines, "RANK"))
            found.append(Explained("argument", words, "how the machines of a replica find each other"))
        found += _times(workload)
        found += _server(lock, workload, guarded)
    else:
        found += _runs(lock, workload)
        found += _job(workload)
    found += _common(lock, workload, secrets)
    return found


def _image(lock: Lock, workload: LockedWorkload) -> str:
    return server.image(lock, workload) if workload.task == "serve" else "${TRAIN_IMAGE}"


def _times(workload: LockedWorkload) -> list[Explained]:
    serving, timing = serving_of(workload), serving_timing(serving_of(workload))
    read = f"{format_gib(serving.stored_bytes)} from {'Blob' if serving.weights == 'blob' else 'the hub'}"
    rate = f"{serving.read_bytes_per_second / 1e6:.0f} MB/s"
    return [
        Explained(
            "probe",
            f"startup: {timing.start_failures} x {PROBE_SECONDS} s = {timing.start_seconds} s",
            f"{read} at {rate}, and {serving.engine_seconds} s to load, compile and capture graphs, in whole minutes",
        ),
        Explained(
            "probe",
            f"readiness: ready.py every {PROBE_SECONDS} s",
            "one real answer first, then /health: a server under load must not lose its clients",
        ),
        Explained("probe", f"liveness: 6 x {PROBE_SECONDS} s", "a restart loads the model again"),
        Explained(
            "stop",
            f"preStop: {timing.pre_stop_seconds} s",
            "until nobody sends it requests any more (assumption endpoint_seconds)",
        ),
        Explained(
            "stop",
            f"terminationGracePeriodSeconds: {timing.grace_seconds}",
            f"preStop, --shutdown-timeout (at least {LEAST_DRAIN_SECONDS} s), and 10 s to let go of the GPU",
        ),
        Explained(
            "stop",
            f"progressDeadlineSeconds: {timing.deadline_seconds}",
            f"{serving.machine_seconds} s for a machine to come, and the startup probe's time",
        ),
    ]


# by field of the run's configuration: where its value comes from
_RUN_REASONS = {
    "run": "the Job's run, and digits of what it learns: of its checkpoints and its result",
    "model": "the workload's checkpoint: from the hub, or by `weights: blob` from the container `models`",
    "max_length": "the workload's context: the memory receipt rests on it",
    "data.train": "the recipe's, or train.jsonl in the folder of the run, in the container `datasets`",
    "weights": "what the card computes in",
    "precision": "what the card computes in",
    "gpus": "GPUs of one machine: a process each",
    "nodes": "machines of one run",
    "checkpoints.folder": "the pod's own disk",
    "checkpoints.every_seconds": "by the eviction rate and what a checkpoint costs (Daly), or half an hour",
    "checkpoints.keep": "storage.checkpoints_kept of the intent, which the bill counts",
    "checkpoints.mirror": "a pod that is evicted loses its disk: the next one goes on from here",
    "result": "the pod's own disk",
    "upload": "where the result is kept",
    "scratch": "inputs from Blob, on the pod's own disk",
    "predicted.allocated_bytes": "the memory receipt without allocator slack and CUDA context",
    "predicted.flops_per_second": "the card's dense peak in 16 bits, for the MFU",
}
# what the plan says and the memory receipt rests on
_RECEIPT = frozenset(
    [
        "task",
        "method",
        "micro_batch",
        "gradient_accumulation_steps",
        "optimizer",
        "lora_rank",
        "lora_dropout",
        "lora_targets",
        "base_quantization",
        "gradient_checkpointing",
        "attention",
        "loss",
    ]
)


def _runs(lock: Lock, workload: LockedWorkload) -> list[Explained]:
    """Every run, and the configuration: of the first whole, of the others what differs."""
    found = [Explained("argument", f"{training.CONFIG}/{training.CONFIG_FILE}", "the settings below, from a ConfigMap")]
    first: dict[str, Any] = {}
    for planned in training.planned_runs(lock, workload):
        said = training.flat(training.plain(planned.config))
        how = "with these settings otherwise" if first else "suspended until somebody starts it"
        found.append(Explained("run", planned.config.run, f"a Job of its own, {how}"))
        found += _settings(planned, {name: value for name, value in said.items() if first.get(name) != value})
        first = first or said
    return found


def _settings(planned: training.Planned, said: Mapping[str, Any]) -> list[Explained]:
    chosen = training.flat(planned.run.recipe)

    def reason(name: str) -> str:
        if name in _RECEIPT:
            return "the plan's: the memory receipt rests on it"
        return _RUN_REASONS.get(name, "the recipe's" if name in chosen else "the program's default")

    return [Explained("setting", f"{name}: {value}", reason(name)) for name, value in said.items() if name != "version"]


def _job(workload: LockedWorkload) -> list[Explained]:
    kept = training_of(workload)
    timing = training_timing(workload, kept)
    micro = "two minutes" if kept.micro_batch_seconds is None else f"{kept.micro_batch_seconds:.0f} s"
    found = [
        Explained(
            "stop",
            f"terminationGracePeriodSeconds: {timing.grace_seconds}",
            f"a micro batch ({micro} at most), {kept.save_seconds} s and {format_gib(workload.checkpoint_bytes)} of"
            " checkpoint to disk and to Blob; a spot machine gives half a minute and no more",
        ),
        Explained(
            "stop",
            f"activeDeadlineSeconds: {timing.deadline_seconds}",
            f"{DEADLINE_FACTOR} x the {workload.hours_per_month:f} hours that a month pays for",
        ),
        Explained("retry", "DisruptionTarget: Ignore", "an eviction spends no attempt"),
        Explained("retry", f"exit code {REFUSED}: FailJob", "configuration, data or memory: it would fail again"),
        Explained("retry", f"exit code {INTERRUPTED}: Ignore", "stopped with a checkpoint: it goes on"),
        Explained(
            "retry",
            f"backoffLimit: {training.RETRIES * kept.machines}",
            "of what a retry may cure" + (", for each machine" if kept.machines > 1 else ""),
        ),
    ]
    if kept.queue:
        found.append(Explained("queue", kept.queue, "Kueue's LocalQueue, which starts the run when there is room"))
    if kept.machines > 1:
        why = "the first pod's name, by a Service without an address; a NetworkPolicy lets a run's machines talk"
        found.append(Explained("environment", "MASTER_ADDR", why))
    return found


def _server(lock: Lock, workload: LockedWorkload, guarded: bool) -> list[Explained]:
    serving, plan = serving_of(workload), server.strategy(lock, workload)
    rolling = plan.get("rollingUpdate")
    told = "Recreate" if rolling is None else f"RollingUpdate, surge {rolling['maxSurge']}"
    reason = {
        "Recreate": "its pool has no room to spare: a second pod would wait for ever",
        "RollingUpdate, surge 0": "its pool has no room to spare, and the others answer meanwhile",
        "RollingUpdate, surge 1": "its pool has room to spare",
    }[told]
    found = [Explained("rollout", told, reason)]
    if workload.windows:
        found.append(Explained("replicas", f"0 to {workload.replicas}, by KEDA", f"the schedule {workload.schedule}"))
    elif workload.schedule == "always":
        found.append(Explained("replicas", str(workload.replicas), "the intent's, always on"))
    else:
        why = f"{workload.schedule} a month are planned: start it by `kubectl scale`"
        found.append(Explained("replicas", "0", why))
    budget = "maxUnavailable: 1" if workload.replicas > 1 else "none"
    why = "a drain takes one at a time" if workload.replicas > 1 else "with one pod it would keep its machine for ever"
    found.append(Explained("disruption", budget, why))
    reach = {
        "cluster": "its namespace, kube-system, and namespaces labelled tonnage/client: true",
        "internal": "also private addresses, by an internal load balancer",
        "gateway": "also the gateway's namespace",
    }[serving.expose]
    found.append(Explained("access", reach, f"expose: {serving.expose}, and a NetworkPolicy"))
    if serving.sleep_level:
        key = "take the API key" if guarded else "take no key"
        why = f"sleep_level {serving.sleep_level}: /sleep and /wake_up are there, and {key}"
        found.append(Explained("environment", "VLLM_SERVER_DEV_MODE=1", why))
    if serving.runtime_adapters:
        why = "runtime_adapters: POST /v1/load_lora_adapter" + (" takes the API key" if guarded else " takes no key")
        found.append(Explained("environment", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", why))
    if guarded:
        why = "where --middleware finds key_guard.py: a ConfigMap, named by its text"
        found.append(Explained("environment", f"PYTHONPATH={server.GUARD_FOLDER}", why))
    return found


def _common(lock: Lock, workload: LockedWorkload, secrets: Collection[str]) -> list[Explained]:
    where = place(lock, workload)
    pools = ", then ".join(where["pools"]) if where["preferred"] else ", ".join(where["pools"])
    asked = resources(lock, workload)
    shares = lock.platform.shares
    found = [
        Explained("place", pools, "the plan's pools of this workload: selected by name, their taints tolerated"),
        Explained("resources", f"{GPU}: {asked['limits'].get(GPU, '0')}", "GPUs of a pod, by the plan"),
        Explained(
            "resources",
            f"cpu {asked['requests']['cpu']}, memory {asked['requests']['memory']} to {asked['limits']['memory']}",
            f"{shares['cpu']:.0%} of the machine's vCPUs and {shares['memory_request']:.0%} to"
            f" {shares['memory_limit']:.0%} of its memory, by its share of the GPUs",
        ),
        Explained("storage", f"/cache: {-(-disk_of(workload).needed_bytes // (1 << 30))}Gi", _cache_reason(workload)),
    ]
    wanted = secrets_of(workload, secrets)
    for variable, secret in NEEDED_SECRETS[workload.task].items():
        if secret in wanted:
            found.append(Explained("secret", variable, f"{secret} of the Key Vault, by the CSI driver"))
    return found


def _cache_reason(workload: LockedWorkload) -> str:
    where = ", on the machine's NVMe disks" if disk_of(workload).cache == "nvme" else ""
    if workload.serving is None:
        return f"the base model's files, checkpoints, the result, and 20 GiB for data and compiled code{where}"
    if workload.serving.weights == "blob":
        return "compiled code; the weights are read from their mount"
    return f"the weights and a tenth, and 8 GiB for compiled code{where}"
