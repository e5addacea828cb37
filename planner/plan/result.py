"""What a plan says: pools, workloads in them, the bill, quota to ask for, and what was considered."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Literal

from pydantic import Field

from planner.catalog.prices import Priority
from planner.cost.lines import Alternative, Line
from planner.fit import Task
from planner.memory.estimate import MemoryEstimate
from planner.model import Amount, Frozen

Verdict = Literal["chosen", "dearer", "does not fit", "cannot run", "unpriced", "quota", "excluded"]


class Pool(Frozen):
    """One AgentPool. min_nodes, max_nodes: machines; usd_per_month: expected, of its machines.

    fallback: it is the twin on demand of a spot pool, used only while Azure has no spot machine
    """

    name: str
    sku: str
    gpu: str
    gpus_per_node: int
    priority: Priority
    min_nodes: int
    max_nodes: int
    workloads: tuple[str, ...]
    usd_per_month: Amount
    fallback: bool = False


class Placed(Frozen):
    """A workload where the plan puts it.

    gpus: of a replica; hours_per_month: of work; arguments: of vLLM; settings: of the trainer
    checkpoint_interval_hours, spot_factor, away_hours_per_month: what evictions ask for, add, and take from a server
    needed_bytes, usable_bytes, memory: of the fullest GPU
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
    hours_per_month: Amount
    arguments: tuple[str, ...] = ()
    settings: dict[str, str] = Field(default_factory=dict)
    checkpoint_interval_hours: Amount | None = None
    checkpoint_bytes: int = 0
    spot_factor: Amount = Decimal(1)
    away_hours_per_month: Amount = Decimal(0)
    needed_bytes: int
    usable_bytes: int
    memory: MemoryEstimate


class Considered(Frozen):
    """A size that was looked at for a workload, in the region chosen: its cheapest way, or why it lost."""

    workload: str
    sku: str
    gpus: int
    priority: Priority | None
    verdict: Verdict
    usd_per_month: Amount | None
    reason: str


class RegionConsidered(Frozen):
    """A region that was allowed: the cheapest plan's cost there, or why there is none."""

    region: str
    usd_per_month: Amount | None
    reason: str


TOTAL_QUOTA, SPOT_QUOTA = "Total Regional vCPUs", "Total Regional Spot vCPUs"


class QuotaAsk(Frozen):
    """vCPUs to have before `pulumi up`. name: as Azure's quota page and `az vm list-usage` write it."""

    name: str
    vcpus: int
    reason: str


class PoolAlternatives(Frozen):
    """One pool's machine bought in every way that has a price, for the hours that it is used."""

    pool: str
    sku: str
    hours_per_month: Amount
    ways: tuple[Alternative, ...]


class PricesUsed(Frozen):
    """Which figures a plan rests on: sheet, digest of its file, oldest and newest day among those used, estimates."""

    sheet: str
    digest: str
    oldest: date
    newest: date
    estimates: int


class Plan(Frozen):
    """The cheapest plan for an intent on a price sheet. Money is USD a month unless the name says otherwise."""

    schema_version: Literal["tonnage.plan/1"] = "tonnage.plan/1"
    intent_digest: str
    region: str
    pools: tuple[Pool, ...]
    workloads: tuple[Placed, ...]
    lines: tuple[Line, ...]
    low_usd: Amount
    usd: Amount
    high_usd: Amount
    gpu_usd: Amount
    unpriced: tuple[str, ...]
    prices: PricesUsed
    quota: tuple[QuotaAsk, ...]
    alternatives: tuple[PoolAlternatives, ...]
    considered: tuple[Considered, ...]
    regions: tuple[RegionConsidered, ...]
    notes: tuple[str, ...] = ()
