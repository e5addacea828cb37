"""What each resource costs a month: the lines of the plan's bill, each on the resource that Azure bills it for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import ROUND_DOWN, Decimal
from typing import NamedTuple

from infra.policy import Recorded
from planner.plan.lock import Lock, LockedPool
from planner.units import CENT

POOL = "azure-native:containerservice:AgentPool"
CLUSTER = "azure-native:containerservice:ManagedCluster"
STORAGE = "azure-native:storage:StorageAccount"
CLAIM = "kubernetes:core/v1:PersistentVolumeClaim"

# Which resource carries a line, by its key or the beginning of it; of several types, the first that the program makes.
CARRIERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("platform/registry", ("azure-native:containerregistry:Registry",)),
    ("platform/image-builds", ("azure-native:containerregistry:Registry",)),
    ("platform/", (CLUSTER,)),
    ("network/private-endpoints", ("azure-native:network:PrivateEndpoint",)),
    ("network/private-dns", ("azure-native:privatedns:PrivateZone",)),
    ("network/public-ip", ("azure-native:network:PublicIPAddress", CLUSTER)),
    ("network/load-balancer", ("azure-native:network:LoadBalancer", CLUSTER)),
    ("network/", (CLUSTER,)),
    ("security/key-vault", ("azure-native:keyvault:Vault",)),
    ("security/defender", (CLUSTER,)),
    ("storage/", (STORAGE,)),
    ("monitoring/logs", ("azure-native:operationalinsights:Workspace",)),
    ("monitoring/metrics", ("azure-native:monitor:AzureMonitorWorkspace",)),
    ("monitoring/grafana", ("azure-native:dashboard:Grafana",)),
)

# Types that Azure does not bill by themselves, and why.
FREE: Mapping[str, str] = {
    "alertsmanagement:PrometheusRuleGroup": "rules over managed Prometheus are not billed by themselves",
    "authorization:ManagementLockByScope": "management",
    "authorization:PolicyAssignment": "management",
    "authorization:RoleAssignment": "access",
    "authorization:RoleDefinition": "access",
    "consumption:Budget": "management",
    "containerregistry:Task": "its runs are platform/image-builds, on the registry",
    "containerregistry:TaskRun": "its runs are platform/image-builds, on the registry",
    "containerservice:MaintenanceConfiguration": "part of the cluster",
    "costmanagement:Budget": "management",
    "keyvault:Secret": "its reads are security/key-vault, on the vault",
    "managedidentity:FederatedIdentityCredential": "access",
    "managedidentity:UserAssignedIdentity": "access",
    "monitor:ActionGroup": "the first 1,000 e-mails a month are free",
    "monitor:DataCollectionEndpoint": "what it takes in is monitoring/metrics and monitoring/logs",
    "monitor:DataCollectionRule": "what it takes in is monitoring/metrics and monitoring/logs",
    "monitor:DataCollectionRuleAssociation": "what it takes in is monitoring/metrics and monitoring/logs",
    "monitor:DiagnosticSetting": "what it sends is monitoring/logs",
    "network:NetworkSecurityGroup": "part of the network",
    "network:PrivateDnsZoneGroup": "its records are network/private-dns",
    "network:Subnet": "part of the network",
    "network:VirtualNetwork": "traffic within it is free",
    "privatedns:PrivateRecordSet": "its zone is network/private-dns",
    "privatedns:VirtualNetworkLink": "its zone is network/private-dns",
    "resources:ResourceGroup": "management",
    "storage:Blob": "its bytes are storage/, on the account",
    "storage:BlobContainer": "its bytes are storage/, on the account",
    "storage:BlobServiceProperties": "part of the account",
    "storage:ManagementPolicy": "part of the account",
}
FALLBACK = "only while spot is away, not counted"


class Cost(NamedTuple):
    """A resource's share of the bill. usd: a month; 0 for what costs nothing by itself, None for no price at all.

    lines: the keys that it carries; unpriced: what usd leaves out, keys among them or the resource itself
    why: where nothing is counted, the reason
    """

    urn: str
    usd: Decimal | None
    lines: tuple[str, ...] = ()
    unpriced: tuple[str, ...] = ()
    why: str = ""

    @property
    def free(self) -> bool:
        return self.usd == 0 and not self.lines


class Bill(NamedTuple):
    """The plan's bill over resources. elsewhere: lines that none of them carries, None where there is no price."""

    costs: tuple[Cost, ...]
    elsewhere: dict[str, Decimal | None]

    @property
    def usd(self) -> Decimal:
        """The sum of all that has a price."""
        amounts = (*(cost.usd for cost in self.costs), *self.elsewhere.values())
        return sum((usd for usd in amounts if usd is not None), Decimal(0))

    @property
    def unpriced(self) -> tuple[str, ...]:
        """Lines without a price, and resources that no line is for: the sum is a lower bound by them."""
        keys = [key for cost in self.costs for key in cost.unpriced]
        keys += [key for key, usd in self.elsewhere.items() if usd is None]
        return tuple(dict.fromkeys(keys))


def bill(resources: Sequence[Recorded], lock: Lock) -> Bill:
    """The lines of a plan over the resources of a program, to the cent: several carriers of a line share it equally.

    Lines are priced by the sheet of the day of the plan. Nothing is left out: what no resource carries is elsewhere.
    """
    shares: dict[str, list[tuple[str, Decimal | None]]] = {row.urn: [] for row in resources}
    elsewhere: dict[str, Decimal | None] = {}
    for key, usd in lock.lines_usd.items():
        carriers = _carriers(key, resources, lock)
        for row, part in zip(carriers, _parts(usd, len(carriers)), strict=True):
            shares[row.urn].append((key, part))
        if not carriers:
            elsewhere[key] = usd
    return Bill(tuple(_cost(row, shares[row.urn], lock) for row in resources), elsewhere)


def _carriers(key: str, resources: Sequence[Recorded], lock: Lock) -> list[Recorded]:
    if key.startswith("gpu/"):
        named = set(key.removeprefix("gpu/").split("+"))
        names = {pool.name for pool in lock.pools if not pool.fallback and named & set(pool.workloads)}
        return [row for row in resources if row.kind == POOL and _pool_name(row) in names]
    kinds = next((kinds for prefix, kinds in CARRIERS if key.startswith(prefix)), ())
    for kind in kinds:
        found = [row for row in resources if row.kind == kind]
        if found:
            return found
    return []


def _parts(usd: Decimal | None, count: int) -> list[Decimal | None]:
    """An amount in equal parts of whole cents; the first ones take what is left over."""
    if usd is None or not count:
        return [None] * count
    each = (usd / count).quantize(CENT, rounding=ROUND_DOWN)
    cents = int((usd - each * count) / CENT)
    parts: list[Decimal | None] = [each + CENT if number < cents else each for number in range(count)]
    return parts


def _cost(row: Recorded, shares: Sequence[tuple[str, Decimal | None]], lock: Lock) -> Cost:
    lines = tuple(key for key, _ in shares)
    if lines:
        known = [usd for _, usd in shares if usd is not None]
        missing = tuple(key for key, usd in shares if usd is None)
        return Cost(row.urn, sum(known, Decimal(0)) if known else None, lines, missing)
    pool = _pool(row, lock)
    if pool is not None and pool.fallback:
        return Cost(row.urn, Decimal(0), why=FALLBACK)
    reason = _free(row)
    if reason:
        return Cost(row.urn, Decimal(0), why=reason)
    return Cost(row.urn, None, unpriced=(f"{row.name} ({row.kind})",), why="no line of the plan is for it")


def _free(row: Recorded) -> str:
    """Why a resource costs nothing by itself, or nothing."""
    package, _, rest = row.kind.partition(":")
    if package == "kubernetes":
        return "" if _takes_disk(row) else "runs on the pools"
    if package == "azure-native":
        return FREE.get(rest, "")
    return "" if package in ("aws", "gcp", "azure") else "no resource of Azure"


def _takes_disk(row: Recorded) -> bool:
    """Whether Kubernetes would make a disk for it, which Azure bills. Bytes in Blob storage are counted elsewhere."""
    spec = row.inputs.get("spec")
    if not isinstance(spec, dict):
        return False
    claims = [spec] if row.kind == CLAIM else []
    if row.kind == "kubernetes:apps/v1:StatefulSet":
        templates = spec.get("volumeClaimTemplates") or []
        claims = [claim.get("spec") or {} for claim in templates if isinstance(claim, dict)]
    # no class named: the cluster's default, which makes disks; an empty one: a volume that is there already
    return any(
        claim.get("storageClassName") is None or ("blob" not in (name := str(claim["storageClassName"])) and name != "")
        for claim in claims
    )


def _pool_name(row: Recorded) -> str:
    return str(row.inputs.get("agentPoolName", row.name))


def _pool(row: Recorded, lock: Lock) -> LockedPool | None:
    if row.kind != POOL:
        return None
    return next((pool for pool in lock.pools if pool.name == _pool_name(row)), None)
