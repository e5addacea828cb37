"""What the program is told: the plan and its intent, checked, and what follows from them. Reads no config itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from decimal import ROUND_CEILING, Decimal

import pulumi
from pulumi_azure_native import authorization, managedidentity

from infra.alerts import Watch, Watched
from infra.storage import Grant
from planner.errors import PlannerError
from planner.plan import Intent, parse_intent
from planner.plan.lock import AGAIN, Lock, check_lock, parse_lock
from planner.stack import INTENT_KEY, PLAN_KEY, needed_secrets
from workloads.pods import NAMESPACE, VAULT_NAMES
from workloads.timing import serving_timing

SECRETS = VAULT_NAMES
SPARE_PERCENT = 10  # of memory that an allocator keeps and does not use
MOST_ENDPOINTS = 3  # of storage, vault and registry
MONTH_DAYS = Decimal(730) / 24


def read_plan(intent: object, plan: object) -> tuple[Intent, Lock]:
    """The intent and the plan of a stack, from its config. PlannerError when they must not be applied."""
    if intent is None:
        raise PlannerError(f"the stack has no {INTENT_KEY}: make one with `planner new`, or choose another stack")
    if plan is None:
        raise PlannerError(f"the stack has no {PLAN_KEY}: {AGAIN}")
    wanted, lock = parse_intent(intent, INTENT_KEY), parse_lock(plan, PLAN_KEY)
    check_lock(lock, wanted, PLAN_KEY)
    endpoints = lock.around.cluster.private_endpoints or 0
    if endpoints > MOST_ENDPOINTS:
        raise PlannerError(
            f"the intent asks for {endpoints} private endpoints and there are {MOST_ENDPOINTS} services to reach"
            f" (storage, vault, registry): lower cluster.private_endpoints, then {AGAIN}"
        )
    kept = lock.around.storage
    if "archive" in (kept.datasets_tier, kept.adapters_tier) and "finetune" in tasks(lock):
        raise PlannerError(
            "training cannot read from the archive tier nor write to it: set storage.datasets_tier and"
            f" storage.adapters_tier to hot, cool or cold, then {AGAIN}"
        )
    if lock.around.cluster.registry == "none" and endpoints == MOST_ENDPOINTS:
        raise PlannerError(
            "the third private endpoint is the registry's and the intent has none: set cluster.private_endpoints to 2,"
            f" then {AGAIN}"
        )
    if lock.around.cluster.registry == "none" and "finetune" in tasks(lock):
        raise PlannerError(
            f"fine-tuning needs a registry for its image and the intent has none: set cluster.registry, then {AGAIN}"
        )
    return wanted, lock


def tasks(lock: Lock) -> tuple[str, ...]:
    """The kinds of workload that a plan has: `finetune`, `serve`."""
    return tuple(sorted({workload.task for workload in lock.workloads}))


def grants(identities: Mapping[str, managedidentity.UserAssignedIdentity], lock: Lock) -> list[Grant]:
    """Which blobs each kind of workload may read or write: servers read, training writes what it makes."""
    whole = any(workload.settings.get("method") == "full" for workload in lock.workloads)
    rights = {
        "serve": {"models": "Reader", "adapters": "Reader"},
        "finetune": {
            "models": "Contributor" if whole else "Reader",
            "datasets": "Reader",
            "checkpoints": "Contributor",
            "adapters": "Contributor",
        },
    }
    return [
        Grant(
            name=f"{kind}-{container}",
            principal_id=identity.principal_id,
            container=container,
            role=f"Storage Blob Data {right}",
        )
        for kind, identity in identities.items()
        for container, right in rights[kind].items()
    ]


def people_grants(
    groups: Sequence[str], deployer: pulumi.Input[str], kind: pulumi.Input[authorization.PrincipalType]
) -> list[Grant]:
    """Who may upload data and read results: the intent's groups, else whoever made the stack."""
    role = "Storage Blob Data Contributor"
    if not groups:
        return [Grant("deployer-uploads", deployer, None, role, kind, once=True)]
    return [
        Grant(f"group-{group[:8]}-uploads", group, None, role, authorization.PrincipalType.GROUP) for group in groups
    ]


def watched(lock: Lock) -> Watch:
    """What the alerts look at: training's memory beside the plan's, its hours, and the machines that are always there.

    A server fills its share of the GPU by design: its memory says nothing. Allocators of training keep spare blocks.
    """
    start = max((serving_timing(w.serving).deadline_seconds for w in lock.workloads if w.serving), default=30 * 60)
    return Watch(
        namespace=NAMESPACE,
        workloads=[
            Watched(name=workload.name, task="serve")
            if workload.task == "serve"
            else Watched(
                name=workload.name,
                task="train",
                gpu_memory_bytes=workload.needed_bytes * (100 + SPARE_PERCENT) // 100,
                deadline_seconds=int(workload.hours_per_month * 3600),
            )
            for workload in lock.workloads
        ],
        pool_minimums={pool.name: pool.min_nodes for pool in lock.pools if pool.min_nodes},
        start_minutes=-(-start // 60),
    )


def check_secrets(lock: Lock, stack: str, given: Collection[str], encrypted: Collection[str]) -> None:
    """PlannerError for a secret that is missing, and for one that lies in the stack file for all to read."""
    for key, command in needed_secrets(lock).items():
        if key not in given:
            raise PlannerError(f"the secret tonnage:{key} is not set: run `{command} --stack {stack}`")
    plain = sorted(set(given) - set(encrypted))
    if plain:
        raise PlannerError(
            f"tonnage:{plain[0]} is in the stack file in plain text: change that secret where it comes from, and set it"
            f" with `pulumi config set --secret tonnage:{plain[0]} --stack {stack}`"
        )


def unbought(lock: Lock) -> list[str]:
    """What the plan counts on and no program buys: reservations and savings plans."""
    return [
        f"pool {pool.name} is planned as {pool.priority}: buy that for {pool.max_nodes} x {pool.sku} in the Azure"
        " portal, until then its machines cost the price on demand"
        for pool in lock.pools
        if pool.priority not in ("spot", "on-demand")
    ]


def daily_cap_gb(lock: Lock) -> int:
    """GB of logs a day after which Log Analytics takes no more: three times the plan's average, at least 1."""
    month = lock.around.cluster.log_gb_per_month or Decimal(0)
    return max(1, int((month / MONTH_DAYS * 3).to_integral_value(rounding=ROUND_CEILING)))
