"""The lock: what a stack file keeps of a plan, and all that the infrastructure reads. What was decided, not why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

from pydantic import Field, ValidationError

from planner.catalog.hardware import gpu_of, machine
from planner.catalog.mig import Profile
from planner.catalog.platform import Platform, platform
from planner.cost.cluster import OS_DISK_GIB, Cluster, Posture, Storage
from planner.cost.schedule import Window, parse_schedule
from planner.errors import DoesNotFit, PlannerError
from planner.fit import Task
from planner.memory.serving_parts import QUANTIZED_AT_START
from planner.model import Amount, Frozen
from planner.plan.beside_memory import serving_of, training_of
from planner.plan.choices import limits, needs_disk, other_vcpus
from planner.plan.intent import FinetuneWorkload, Intent, model_of
from planner.plan.result import TOTAL_QUOTA, Placed, Plan, Pool, PricesUsed
from planner.plan.serving import Serving
from planner.plan.training import Training
from planner.units import format_gib, format_usd, round_money

VERSION = 1


def again(stack: str = "STACK") -> str:
    """What to run for a new plan of a stack."""
    return f"run `planner plan --stack {stack}` and commit the result"


AGAIN = again()  # where the name is not known


class LockedPool(Pool):
    """A pool with what AKS must be told of its machines.

    os_disk_type: Ephemeral where the machine's own disk is large enough; driver: Install where AKS brings NVIDIA's
    max_surge: machines that an upgrade may add, as far as the quota is known to allow
    supports_bf16: its GPUs compute in bfloat16
    gpu_instance_profile: how its GPUs are cut by MIG; gpus_per_node then counts the devices
    """

    vcpus_per_node: int
    ram_gib_per_node: int
    quota_family: str
    os_disk_type: Literal["Ephemeral", "Managed"]
    os_disk_gib: int
    driver: Literal["Install", "None"]
    max_surge: int
    supports_bf16: bool
    gpu_instance_profile: Profile | None = None


class LockedWorkload(Frozen):
    """A workload as Placed, with its schedule's windows and the memory receipt as expected bytes by component.

    hub_id: of the weights as they are served or trained; None where nobody said where those lie
    serving, training: of a server and of training, what else they are run by
    """

    name: str
    task: Task
    model: str
    hub_id: str | None
    context: int
    pool: str
    replicas: int
    gpus: int
    schedule: str
    windows: tuple[Window, ...] = ()
    hours_per_month: Amount
    arguments: tuple[str, ...] = ()
    settings: dict[str, str] = Field(default_factory=dict)
    checkpoint_interval_hours: Amount | None = None
    checkpoint_bytes: int = 0
    needed_bytes: int
    usable_bytes: int
    memory_bytes: dict[str, int]
    serving: Serving | None = None
    training: Training | None = None


class Around(Frozen):
    """The cluster around the pools, with every default resolved. maintenance: the window for upgrades, in UTC."""

    posture: Posture
    cluster: Cluster
    storage: Storage
    private_cluster: bool
    maintenance: Window


class Lock(Frozen):
    """What a stack file keeps of a plan.

    version: of this format; intent: the digest of the intent that it answers; digest: of all the rest
    low_usd, usd, high_usd: a month, unpriced lines left out; lines_usd: expected by line, None where there is no price
    quota: vCPUs to have, by the name Azure gives the quota
    """

    version: Literal[1] = 1
    intent: str
    digest: str = ""
    region: str
    usd: Amount
    low_usd: Amount
    high_usd: Amount
    approved_usd_per_month: Amount | None
    pools: tuple[LockedPool, ...]
    workloads: tuple[LockedWorkload, ...]
    around: Around
    platform: Platform
    quota: dict[str, int]
    lines_usd: dict[str, Amount | None]
    prices: PricesUsed

    def plain(self) -> dict[str, Any]:
        """As a stack file holds it, defaults too: a later version's defaults must not change what was decided."""
        return self.model_dump(mode="json")

    def pool(self, name: str) -> LockedPool:
        """The pool of that name; KeyError where there is none."""
        return {pool.name: pool for pool in self.pools}[name]


def lock_of(plan: Plan, intent: Intent) -> Lock:
    """The lock of a plan. Amounts are rounded to cents: a lock is read by people, and compared by programs."""
    logs = next((line.quantity for line in plan.lines if line.key == "monitoring/logs"), None)
    cluster = intent.cluster.resolved(intent.posture).model_copy(update={"log_gb_per_month": logs})
    redundancy = intent.storage.redundancy or ("zrs" if intent.posture == "prod" else "lrs")
    private = intent.access.private_cluster
    surges = _surges(plan, intent)
    lock = Lock(
        intent=intent.digest,
        region=plan.region,
        usd=round_money(plan.usd),
        low_usd=round_money(plan.low_usd),
        high_usd=round_money(plan.high_usd),
        approved_usd_per_month=intent.approved_usd_per_month,
        pools=tuple(_locked_pool(pool, intent, surges[pool.name]) for pool in plan.pools),
        workloads=tuple(_locked_workload(placed, plan, intent) for placed in plan.workloads),
        around=Around(
            posture=intent.posture,
            cluster=cluster,
            storage=intent.storage.model_copy(update={"redundancy": redundancy}),
            private_cluster=intent.posture == "prod" if private is None else private,
            maintenance=parse_schedule(intent.maintenance).windows[0],
        ),
        platform=platform(),
        quota={ask.name: ask.vcpus for ask in plan.quota},
        lines_usd={line.key: None if line.usd is None else round_money(line.usd) for line in plan.lines},
        prices=plan.prices,
    )
    return lock.model_copy(update={"digest": _digest(lock.plain())})


def _digest(data: Mapping[str, Any]) -> str:
    """The first 16 hex digits of the SHA-256 of what a lock says."""
    said = {key: value for key, value in data.items() if key != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def _locked_pool(pool: Pool, intent: Intent, max_surge: int) -> LockedPool:
    size = machine(pool.sku)
    managed = needs_disk(size)
    return LockedPool(
        **pool.model_dump() | {"usd_per_month": round_money(pool.usd_per_month)},
        vcpus_per_node=size.vcpu or 0,
        ram_gib_per_node=size.ram_gib or 0,
        quota_family=size.quota_family,
        os_disk_type="Managed" if managed else "Ephemeral",
        os_disk_gib=OS_DISK_GIB,
        driver="None" if size.driver == "rocm" or size.gpu is None else "Install",
        supports_bf16=size.gpu is None or gpu_of(size).supports_bf16,
        max_surge=max_surge,
        gpu_instance_profile=intent.gpu_instance_profile if size.gpu else None,
    )


def _surges(plan: Plan, intent: Intent) -> dict[str, int]:
    """By pool, 1 where the stated quota of family and region has room for one machine more than is asked for, else 0.

    Room is handed out pool by pool, since pools may be upgraded at the same time. Of a region's total that is not
    stated nothing is known, and the family's room counts.
    """
    stated = {name.lower().replace(" ", ""): quota for name, quota in intent.quota.items()}
    limit = limits(stated, plan.region, other_vcpus(intent))
    asked = {ask.name.lower(): ask.vcpus for ask in plan.quota}
    total = asked[TOTAL_QUOTA.lower()]
    found = {}
    for pool in plan.pools:
        size = machine(pool.sku)
        family, vcpus = size.quota_family.lower(), size.vcpu or 0
        needed = asked.get(family, 0) + vcpus
        room = limit.family.get(family, -1) >= needed and (limit.total is None or limit.total >= total + vcpus)
        found[pool.name] = int(room and pool.priority != "spot")  # AKS upgrades spot pools without surge
        if found[pool.name]:
            asked[family], total = needed, total + vcpus
    return found


def _locked_workload(placed: Placed, plan: Plan, intent: Intent) -> LockedWorkload:
    shared = placed.model_dump(include=set(LockedWorkload.model_fields))
    wanted = next(workload for workload in intent.workloads if workload.name == placed.name)
    serving = training = None
    if isinstance(wanted, FinetuneWorkload):
        training = training_of(wanted, placed, plan, intent)
    else:
        serving = serving_of(wanted, placed, plan, intent)
        stored = wanted.settings.get("quantization") in (None, *QUANTIZED_AT_START)
        own = stored or model_of(intent, wanted).quantization is not None
        shared["hub_id"] = wanted.checkpoint or (placed.hub_id if own else None)
    return LockedWorkload(
        **shared,
        windows=parse_schedule(placed.schedule).windows,
        memory_bytes={part.name: part.expected_bytes for part in placed.memory.components},
        serving=serving,
        training=training,
    )


def parse_lock(data: object, what: str, stack: str = "STACK") -> Lock:
    """The lock in a mapping, as a stack file or Pulumi's config holds it. stack: what to plan again, where known.

    PlannerError for one of a newer version, one that lacks something, and one that was edited by hand.
    """
    if not isinstance(data, Mapping):
        raise PlannerError(f"{what} holds no plan: {again(stack)}")
    check_version(data, what)
    try:
        lock = Lock.model_validate(data)
        intact = lock.digest == _digest(data)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise PlannerError(f"{what} is not whole (see its {field}): {again(stack)}") from error
    except (TypeError, ValueError, RecursionError):  # what JSON cannot hold, such as a date that lost its quotes
        intact = False
    if not intact:
        raise PlannerError(f"{what} was edited by hand: edit the intent instead, then {again(stack)}")
    return lock


def check_version(data: object, what: str) -> None:
    """PlannerError for a lock of a newer version, which must be neither read nor replaced."""
    version = data.get("version") if isinstance(data, Mapping) else None
    if isinstance(version, int) and version > VERSION:
        raise PlannerError(
            f"{what} was written by a newer Tonnage (format {version}, this one reads {VERSION}): upgrade tonnage"
        )


def check_lock(lock: Lock, intent: Intent, what: str, stack: str = "STACK") -> None:
    """Whether a lock may be applied for that intent. PlannerError when it answers another, or nothing is approved;

    DoesNotFit for a workload beyond its GPU, and for a cost above what is approved.
    """
    if lock.intent != intent.digest:
        raise PlannerError(f"{what} answers another intent than the one beside it: {again(stack)}")
    for workload in lock.workloads:
        if workload.hub_id is None:
            raise PlannerError(
                f"{workload.name}: where the planned weights of {workload.model} are stored is not known: write"
                f" `checkpoint:` with their hub id into its workload, then {again(stack)}"
            )
        if workload.needed_bytes > workload.usable_bytes:
            raise DoesNotFit(
                f"{workload.name} needs {format_gib(workload.needed_bytes)} of a GPU that has"
                f" {format_gib(workload.usable_bytes)}: change the intent, then {again(stack)}"
            )
    approved = lock.approved_usd_per_month
    if approved is None:
        raise PlannerError(
            "nothing is approved for this stack: write approved_usd_per_month into its intent, which becomes the amount"
            " of its Azure Budget"
        )
    if lock.usd > approved:
        raise DoesNotFit(
            f"{what} costs {format_usd(lock.usd)} a month and {format_usd(approved)} is approved: raise the approval or"
            " change the intent"
        )


_UNSAID = ("digest", "intent", "windows")  # of which people read another field
_ABSENT = object()
_WORDS = {
    "usd": "cost a month",
    "low_usd": "lowest cost a month",
    "high_usd": "highest cost a month",
    "usd_per_month": "cost a month",
    "approved_usd_per_month": "approved a month",
    "min_nodes": "minimum of machines",
    "max_nodes": "maximum of machines",
    "sku": "size",
    "gpus_per_node": "GPUs a machine",
    "gpu_instance_profile": "MIG profile",
    "hub_id": "checkpoint",
    "needed_bytes": "memory needed",
    "usable_bytes": "memory usable",
    "log_gb_per_month": "GB of logs a month",
}
# what is told first; the rest follows in the order of the fields
_FIRST = (("region", "usd", "low_usd", "high_usd", "approved_usd_per_month"), ("pools",), ("quota",))


def changes(old: Lock | None, new: Lock) -> tuple[str, ...]:
    """What differs between two locks, a line each: `pool a100spot: size X -> Y`. Cost, pools and quota come first.

    A pool or workload that comes or goes is one line; what only programs read (digests) is left out.
    """
    if old is None:
        return ("the first plan of this stack",)
    found = sorted(_differences(old.plain(), new.plain()), key=lambda one: _rank(one[0][0]))
    return tuple(_change(*difference) for difference in found)


def _rank(field: str) -> int:
    return next((rank for rank, fields in enumerate(_FIRST) if field in fields), len(_FIRST))


def _differences(
    before: object, after: object, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], object, object]]:
    """The smallest parts that differ, as path, before, after; _ABSENT where one side has none."""
    before, after = _by_name(before), _by_name(after)
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys((*after, *before)):
            if key not in _UNSAID:
                yield from _differences(before.get(key, _ABSENT), after.get(key, _ABSENT), (*path, key))
    elif before != after:
        yield path, before, after


def _by_name(value: object) -> object:
    """A list of named things as a mapping; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(part, Mapping) and "name" in part for part in value):
        return {str(part["name"]): {k: v for k, v in part.items() if k != "name"} for part in value}
    return value


def _change(path: tuple[str, ...], before: object, after: object) -> str:
    *outer, key = path
    group = outer[0] if outer else ""
    if group in ("pools", "workloads", "quota", "lines_usd") and len(outer) == 1:
        what = {"pools": "pool", "workloads": "workload", "quota": "quota", "lines_usd": "cost of"}[group]
        what = f"{what} {key}"
    else:
        where = {"pools": "pool", "workloads": "workload"}.get(group)
        outer = [where, *outer[1:]] if where else [part for part in outer if part != "around"]
        what = f"{' '.join(outer)}: ".replace("_bytes", "").replace("_", " ") if outer else ""
        what += _WORDS.get(key, key.replace("_", " "))
    unit = "usd" if group == "lines_usd" else "bytes" if "memory_bytes" in outer else key
    if before is _ABSENT:
        return f"{what} is new: {_shown(after, unit)}"
    if after is _ABSENT:
        return f"{what} is gone: {_shown(before, unit)}"
    if key == "arguments" and isinstance(before, list) and isinstance(after, list):
        return f"{what} {_flags_changed(before, after)}"
    was, now = _shown(before, unit), _shown(after, unit)
    if was == now:  # what rounds to the same
        was, now = str(before), str(after)
    return f"{what} {was} -> {now}"


def _flags_changed(before: Sequence[str], after: Sequence[str]) -> str:
    """`with --a 1, without --b`: flags with their values that come and go."""
    had, has = _flags(before), _flags(after)
    told = [f"with {flag}" for flag in has if flag not in had] + [f"without {flag}" for flag in had if flag not in has]
    return ", ".join(told) or "in another order"


def _flags(arguments: Sequence[str]) -> list[str]:
    """Each flag with what follows it up to the next."""
    found: list[str] = []
    for part in arguments:
        if part.startswith("-") or not found:
            found.append(part)
        else:
            found[-1] += f" {part}"
    return found


def _shown(value: object, unit: str) -> str:
    """A value for people, by the last part of its name."""
    if isinstance(value, Mapping) and "sku" in value:
        return f"up to {value['max_nodes']} x {value['sku']}, {value['priority']}"
    if isinstance(value, Mapping) and "model" in value:
        return f"{value['model']} at {value['context']:,} tokens on {value['pool']}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(inner, name)}" for name, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_shown(part, unit) for part in value) or "none"
    if value is None:
        return "unpriced" if unit == "usd" else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if unit.endswith("bytes") and isinstance(value, int):
        return format_gib(value)
    if "usd" in unit.split("_"):
        return format_usd(Decimal(str(value)))
    if "gb" in unit.split("_"):
        return f"{Decimal(str(value)).quantize(Decimal('0.1')).normalize():f}"
    return str(value)
