"""What a cluster costs beside its GPUs: system nodes, storage, network, monitoring, security, people's machines."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

from pydantic import Field, field_validator

from planner.catalog.assumptions import assumption
from planner.catalog.prices import PriceSheet, Provenance
from planner.cost.lines import Line, figure, meter_line, vm_line
from planner.cost.schedule import MONTH_HOURS, Schedule, parse_schedule
from planner.cost.spot import Range
from planner.model import Frozen
from planner.units import GIB

Posture = Literal["dev", "prod"]
OS_DISK_GIB = 128  # what AKS gives a node unless told otherwise; also the size of a P10 disk
MONTH_DAYS = MONTH_HOURS / 24
Tier = Literal["hot", "cool", "cold", "archive"]


class Cluster(Frozen):
    """The cluster beside its GPU pools. None: what the posture asks for.

    system_sku, system_nodes: of the system pool; zones: its availability zones, where the region has them
    tier: of the control plane; registry: of the container registry
    private_endpoints: how many; egress_gb_per_month: answers and downloads that leave Azure
    grafana_users: active in a month; scrape_interval_seconds: of managed Prometheus
    log_gb_per_month: None follows from the nodes
    """

    system_sku: str = "Standard_D4s_v5"
    system_nodes: int | None = Field(default=None, ge=1, le=100)
    zones: tuple[Literal["1", "2", "3"], ...] = ()
    tier: Literal["free", "standard", "premium"] | None = None
    registry: Literal["basic", "standard", "premium", "none"] | None = None
    private_endpoints: int | None = Field(default=None, ge=0, le=100)
    egress_gb_per_month: Decimal = Field(default=Decimal(50), ge=0, le=10**9)
    scrape_interval_seconds: int = Field(default=30, ge=1, le=3600)
    log_gb_per_month: Decimal | None = Field(default=None, ge=0, le=10**6)
    grafana: bool = False
    grafana_users: int = Field(default=2, ge=0, le=100000)
    defender: bool | None = None

    @field_validator("system_sku")
    @classmethod
    def _arm_name(cls, name: str) -> str:
        return name if name.startswith("Standard_") else f"Standard_{name}"

    def resolved(self, posture: Posture) -> Cluster:
        """With every None replaced by what the posture asks for."""
        prod = posture == "prod"
        defaults = {
            "system_nodes": 3 if prod else 2,
            "tier": "standard" if prod else "free",
            "registry": "premium" if prod else "basic",
            "private_endpoints": 3 if prod else 0,
            "defender": prod,
        }
        return self.model_copy(update={k: v for k, v in defaults.items() if getattr(self, k) is None})


class Storage(Frozen):
    """What is kept in Blob storage. Weights and adapter sizes follow from the model.

    redundancy: None follows the posture; ..._tier: where each kind lies; checkpoints_kept: the newest so many stay
    soft_delete_days: deleted blobs are billed that much longer; archive_gb: what else is kept in the archive tier
    """

    redundancy: Literal["lrs", "zrs"] | None = None
    dataset_gb: Decimal = Field(default=Decimal(10), ge=0, le=10**9)
    archive_gb: Decimal = Field(default=Decimal(0), ge=0, le=10**9)
    adapters_kept: int = Field(default=5, ge=0, le=10**6)
    checkpoints_kept: int = Field(default=2, ge=0, le=10**6)
    soft_delete_days: int = Field(default=7, ge=0, le=365)
    weights_tier: Literal["hot", "cool", "cold"] = "hot"
    datasets_tier: Tier = "hot"
    adapters_tier: Tier = "hot"
    checkpoints_tier: Literal["hot", "cool", "cold"] = "hot"


class Developers(Frozen):
    """People's machines: how many, which size, how many hours a month each."""

    count: int = Field(default=0, ge=0, le=10000)
    sku: str = "Standard_D4s_v5"
    schedule: str = "200h"

    @field_validator("sku")
    @classmethod
    def _arm_name(cls, name: str) -> str:
        return name if name.startswith("Standard_") else f"Standard_{name}"

    @field_validator("schedule")
    @classmethod
    def _is_schedule(cls, text: str) -> str:
        return parse_schedule(text).text

    @property
    def hours(self) -> Schedule:
        return parse_schedule(self.schedule)


class Kept(Frozen):
    """Bytes that the workloads leave in Blob storage.

    weights_bytes: of the models served and trained; adapter_bytes, checkpoint_bytes: of one
    checkpoints_written: a month, each deleted when newer ones have come
    """

    weights_bytes: int = 0
    adapter_bytes: int = 0
    checkpoint_bytes: int = 0
    checkpoints_written: Decimal = Decimal(0)


class GpuLoad(Frozen):
    """What the GPU pools bring to other lines.

    pod_hours: a month over all GPU pods (for metrics and logs); os_disk_hours: of nodes without a large local disk
    """

    pod_hours: Decimal = Decimal(0)
    os_disk_hours: Decimal = Decimal(0)


def cluster_lines(
    sheet: PriceSheet,
    region: str,
    *,
    posture: Posture,
    cluster: Cluster,
    storage: Storage,
    developers: Developers,
    kept: Kept,
    load: GpuLoad,
    internal_address: bool = False,
) -> tuple[Line, ...]:
    """Every line of a month's bill but the GPU machines themselves. Unpriced lines say so.

    internal_address: a server has one in the network, behind the cluster's second load balancer
    """
    cluster = cluster.resolved(posture)
    lines = [
        *_people(sheet, region, developers),
        *_platform(sheet, region, cluster, load),
        *_storage(sheet, region, posture, storage, kept),
        *_network(sheet, region, cluster, internal_address),
        *_monitoring(sheet, region, cluster, load),
        *_security(sheet, region, cluster),
    ]
    return tuple(lines)


def _people(sheet: PriceSheet, region: str, developers: Developers) -> list[Line]:
    if not developers.count:
        return []
    return [
        vm_line(
            sheet,
            key="people/developer-machines",
            label="Developers' machines",
            sku=developers.sku,
            region=region,
            priority="on-demand",
            count=developers.count,
            hours=developers.hours.hours_per_month(),
        ),
        meter_line(
            sheet,
            key="people/developer-disks",
            label="Disks of the developers' machines",
            basis=f"{developers.count} premium disks of {OS_DISK_GIB} GiB (P10), also while machines are off",
            meter="disk-premium-p10",
            region=region,
            units=Decimal(developers.count),
            service="Storage",
        ),
    ]


def _platform(sheet: PriceSheet, region: str, cluster: Cluster, load: GpuLoad) -> list[Line]:
    count = cluster.system_nodes or 0
    lines = [
        vm_line(
            sheet,
            key="platform/system-nodes",
            label="System nodes of the cluster",
            sku=cluster.system_sku,
            region=region,
            priority="on-demand",
            count=count,
            hours=MONTH_HOURS,
        )
    ]
    disks = count * MONTH_HOURS + load.os_disk_hours
    lines.append(
        meter_line(
            sheet,
            key="platform/os-disks",
            label="System disks of the nodes",
            basis=f"{OS_DISK_GIB} GiB premium disks (P10), {figure(disks / MONTH_HOURS, 2)} disk-months",
            meter="disk-premium-p10",
            region=region,
            units=disks / MONTH_HOURS,
            service="Storage",
            why=f"{figure(disks, 1)} node hours without a local disk large enough / 730",
        )
    )
    if cluster.tier == "free":
        fee = assumption("aks_free_tier_usd_per_hour")
        note = fee.text.rstrip(".")
        lines.append(
            Line(
                key="platform/control-plane",
                group="platform",
                label="Cluster control plane",
                basis="Free tier, no uptime guarantee",
                quantity=MONTH_HOURS,
                unit="hour",
                unit_usd=fee.expected,
                low_usd=fee.low * MONTH_HOURS,
                usd=fee.expected * MONTH_HOURS,
                high_usd=fee.high * MONTH_HOURS,
                formula=f"no fee in the Free tier; high: {figure(MONTH_HOURS)} h x {fee.high} USD",
                provenance=Provenance(source=fee.source, as_of=fee.as_of, estimate=fee.estimate, note=note),
                service="Azure Kubernetes Service",
                region=region,
                note=note,
            )
        )
    else:
        lines.append(
            meter_line(
                sheet,
                key="platform/control-plane",
                label="Cluster control plane",
                basis=f"{cluster.tier} tier, all month",
                meter=f"aks-{cluster.tier}",
                region=region,
                units=MONTH_HOURS,
                service="Azure Kubernetes Service",
            )
        )
    if cluster.registry != "none":
        days = MONTH_HOURS / 24
        build = assumption("image_build_vcpu_seconds")
        lines.append(
            meter_line(
                sheet,
                key="platform/registry",
                label="Container registry",
                basis=f"{cluster.registry} tier",
                meter=f"acr-{cluster.registry}",
                region=region,
                units=days,
                service="Container Registry",
                why="730 h / 24",
            )
        )
        lines.append(
            meter_line(
                sheet,
                key="platform/image-builds",
                label="Building the training image",
                basis=f"about {figure(build.expected, 0)} vCPU-seconds",
                meter="acr-build",
                region=region,
                units=(build.low, build.expected, build.high),
                service="Container Registry",
                why=build.text,
            )
        )
    return lines


def _storage(sheet: PriceSheet, region: str, posture: Posture, storage: Storage, kept: Kept) -> list[Line]:
    redundancy = storage.redundancy or ("zrs" if posture == "prod" else "lrs")
    # a deleted blob is billed for soft_delete_days more: so many of a month's deleted checkpoints are there at a time
    deleted = max(kept.checkpoints_written - storage.checkpoints_kept, Decimal(0))
    lingering = deleted * storage.soft_delete_days / MONTH_DAYS

    def capacity(key: str, label: str, basis: str, gigabytes: Decimal, why: str, tier: Tier = "hot") -> Line:
        kind = "lrs" if tier == "archive" else redundancy
        return meter_line(
            sheet,
            key=f"storage/{key}",
            label=label,
            basis=f"{figure(gigabytes, 2)} GB {tier}, {basis}" if basis else f"{figure(gigabytes, 2)} GB {tier}",
            meter=f"blob-{tier}-{kind}",
            region=region,
            units=gigabytes,
            service="Storage",
            why=why,
        )

    weights, adapter, checkpoint = (
        _billing_gb(n) for n in (kept.weights_bytes, kept.adapter_bytes, kept.checkpoint_bytes)
    )
    lines = [capacity("weights", "Model weights", "", weights, "bytes of the checkpoint / 2^30", storage.weights_tier)]
    if storage.dataset_gb:
        lines.append(capacity("datasets", "Training data", "", storage.dataset_gb, "as stated", storage.datasets_tier))
    if kept.adapter_bytes and storage.adapters_kept:
        text = f"{storage.adapters_kept} trained adapters"
        why = f"{storage.adapters_kept} x {figure(adapter, 3)} GB"
        kept_gb = adapter * storage.adapters_kept
        lines.append(capacity("adapters", "Trained adapters", text, kept_gb, why, storage.adapters_tier))
    if kept.checkpoint_bytes:
        if storage.checkpoints_kept:
            text = f"the newest {storage.checkpoints_kept} checkpoints"
            why = f"{storage.checkpoints_kept} x {figure(checkpoint, 3)} GB"
            kept_gb = checkpoint * storage.checkpoints_kept
            lines.append(capacity("checkpoints", "Training checkpoints", text, kept_gb, why, storage.checkpoints_tier))
        if lingering:
            text = f"deleted checkpoints, kept {storage.soft_delete_days} days more"
            why = (
                f"{figure(deleted, 1)} deleted a month x {storage.soft_delete_days} days /"
                f" {figure(MONTH_DAYS, 2)} x {figure(checkpoint, 3)} GB"
            )
            kept_gb = checkpoint * lingering
            lines.append(
                capacity("soft-deleted", "Soft-deleted checkpoints", text, kept_gb, why, storage.checkpoints_tier)
            )
    if storage.archive_gb:
        lines.append(capacity("archive", "Archive", "", storage.archive_gb, "as stated", "archive"))
    operations = assumption("blob_operations_per_month")
    for kind in ("writes", "reads"):
        lines.append(
            meter_line(
                sheet,
                key=f"storage/{kind}",
                label=f"Storage {kind}",
                basis=f"about {figure(operations.expected / 2, 0)} operations",
                meter=f"blob-hot-{redundancy}-{kind}",
                region=region,
                units=(operations.low / 20000, operations.expected / 20000, operations.high / 20000),
                service="Storage",
                why=operations.text,
            )
        )
    return lines


def _billing_gb(size_bytes: int) -> Decimal:
    """Azure bills storage by 2^30 bytes and writes GB."""
    return Decimal(size_bytes) / GIB


def _network(sheet: PriceSheet, region: str, cluster: Cluster, internal_address: bool) -> list[Line]:
    egress = cluster.egress_gb_per_month

    def line(key: str, label: str, basis: str, meter: str, units: Decimal, service: str, times: int = 1) -> Line:
        return meter_line(
            sheet,
            key=f"network/{key}",
            label=label,
            basis=basis,
            meter=meter,
            region=region,
            units=units,
            service=service,
            times=Decimal(times),
        )

    gb = f"{figure(egress, 1)} GB"
    lines = [
        line("egress", "Data leaving Azure", gb, "egress-internet", egress, "Bandwidth"),
        line("load-balancer", "Load balancer", "all month", "load-balancer", MONTH_HOURS, "Load Balancer"),
        line("load-balancer-data", "Load balancer, data", gb, "load-balancer-data", egress, "Load Balancer"),
        line("public-ip", "Public address", "all month", "public-ip", MONTH_HOURS, "Virtual Network"),
    ]
    if internal_address:
        label = "Load balancer inside the network"
        lines.append(line("internal-load-balancer", label, "all month", "load-balancer", MONTH_HOURS, "Load Balancer"))
    count = cluster.private_endpoints or 0
    if count:
        text = f"{count} endpoints, all month"
        lines.append(
            line("private-endpoints", "Private endpoints", text, "private-endpoint", MONTH_HOURS, "Private Link", count)
        )
        zones = f"{count} zones"
        lines.append(
            line("private-dns", "Private DNS zones", zones, "private-dns-zone", Decimal(1), "Azure DNS", count)
        )
    return lines


def _monitoring(sheet: PriceSheet, region: str, cluster: Cluster, load: GpuLoad) -> list[Line]:
    per_node, per_pod = assumption("prometheus_series_per_node"), assumption("prometheus_series_per_gpu_pod")
    system_hours = (cluster.system_nodes or 0) * MONTH_HOURS
    node_hours = system_hours + load.pod_hours  # a GPU pod counts as a node of its own: most fill one
    scrapes = Decimal(3600) / cluster.scrape_interval_seconds

    def samples(node_series: Decimal, pod_series: Decimal) -> Decimal:
        return (node_hours * node_series + load.pod_hours * pod_series) * scrapes / 10_000_000

    per_day = assumption("log_gb_per_node_day")
    days = node_hours / 24
    logs: Range = (per_day.low * days, per_day.expected * days, per_day.high * days)
    why = f"{figure(node_hours, 1)} node hours / 24 x {per_day.expected} GB a day"
    if cluster.log_gb_per_month is not None:
        logs, why = (cluster.log_gb_per_month,) * 3, "as stated"
    lines = [
        meter_line(
            sheet,
            key="monitoring/metrics",
            label="Metrics (managed Prometheus)",
            basis=f"a sample every {cluster.scrape_interval_seconds} s",
            meter="prometheus-samples",
            region=region,
            units=(
                samples(per_node.low, per_pod.low),
                samples(per_node.expected, per_pod.expected),
                samples(per_node.high, per_pod.high),
            ),
            service="Azure Monitor",
            why=(
                f"({figure(node_hours, 1)} node hours x {per_node.expected} series + {figure(load.pod_hours, 1)} GPU"
                f" pod hours x {per_pod.expected}) x {figure(scrapes, 1)} scrapes an hour"
            ),
        ),
        meter_line(
            sheet,
            key="monitoring/logs",
            label="Logs (Log Analytics)",
            basis=f"about {figure(logs[1], 1)} GB",
            meter="log-analytics",
            region=region,
            units=logs,
            service="Log Analytics",
            why=why,
        ),
    ]
    if cluster.grafana:
        lines.append(
            meter_line(
                sheet,
                key="monitoring/grafana",
                label="Dashboards (managed Grafana)",
                basis="2 nodes, all month",
                meter="grafana-node",
                region=region,
                units=MONTH_HOURS * 2,
                service="Azure Managed Grafana",
            )
        )
        lines.append(
            meter_line(
                sheet,
                key="monitoring/grafana-users",
                label="People who use the dashboards",
                basis=f"{cluster.grafana_users} in a month",
                meter="grafana-user",
                region=region,
                units=Decimal(cluster.grafana_users),
                service="Azure Managed Grafana",
            )
        )
    return lines


def _security(sheet: PriceSheet, region: str, cluster: Cluster) -> list[Line]:
    operations = assumption("key_vault_operations_per_month")
    lines = [
        meter_line(
            sheet,
            key="security/key-vault",
            label="Key vault",
            basis=f"about {figure(operations.expected, 0)} operations",
            meter="key-vault-operations",
            region=region,
            units=(operations.low / 10000, operations.expected / 10000, operations.high / 10000),
            service="Key Vault",
            why=operations.text,
        )
    ]
    if cluster.defender:
        lines.append(
            meter_line(
                sheet,
                key="security/defender",
                label="Microsoft Defender for Containers",
                basis="by vCPU of the nodes",
                meter="defender-containers-vcpu",
                region=region,
                units=Decimal(1),
                service="Microsoft Defender for Cloud",
            )
        )
    return lines
