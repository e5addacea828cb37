"""What ARM and its resource providers refuse, beyond names and shapes: parents, references, use, quota, what cannot
change.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from standin import arm_outputs
from standin.arm_table import TYPES
from standin.arm_types import ArmType
from standin.faults import ArmError, quota_exceeded

Resources = dict[str, dict[str, Any]]
_PATTERNS = [
    (kind, re.compile("^" + re.sub(r"{\w+}", r"[^/]+", kind.path.lower()) + "$"))
    for kind in TYPES.values()
    if kind.path.startswith("/subscriptions")
]


def kind_of(resource_id: str) -> ArmType | None:
    """The type that an id has, among those the stand-in knows."""
    return next((kind for kind, pattern in _PATTERNS if pattern.match(resource_id.lower())), None)


def parents(kind: ArmType, resource_id: str) -> list[str]:
    """The ids that must exist before this one can, outermost first."""
    if kind.path.startswith("/{"):
        scope = resource_id.rsplit("/providers/", 1)[0]
        above = kind_of(scope)
        return [*parents(above, scope), scope] if above is not None else []
    found = []
    parts = resource_id.split("/")
    if len(parts) > 5:
        found.append("/".join(parts[:5]))
    # /subscriptions/S/resourceGroups/G/providers/P/type/name[/type/name]: each pair after the first is nested.
    for end in range(9, len(parts) - 1, 2):
        above_id = "/".join(parts[:end])
        if kind_of(above_id) is not None and not above_id.lower().endswith("/blobservices/default"):
            found.append(above_id)
    return found


def references(value: Any) -> Iterator[str]:
    """Every ARM id of a known type within the inputs (also where it is the key of an object)."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from references(key)
            yield from references(part)
    elif isinstance(value, list):
        for part in value:
            yield from references(part)
    elif isinstance(value, str) and value.lower().startswith("/subscriptions/") and kind_of(value) is not None:
        yield value


def check_parents(kind: ArmType, resource_id: str, resources: Resources) -> None:
    """Refuse where the group, the parent or the scope does not exist."""
    for above in parents(kind, resource_id):
        if above.lower() in resources:
            continue
        above_kind = kind_of(above)
        name, group = above.rsplit("/", 1)[1], above.split("/")[4]
        if above_kind is None or above_kind.token.endswith(":ResourceGroup"):
            raise ArmError(404, "ResourceGroupNotFound", f"Resource group '{group}' could not be found.")
        code = (
            "ResourceNotFound"
            if kind.path.startswith("/{") or "Network/" in kind.arm_type
            else "ParentResourceNotFound"
        )
        raise ArmError(
            404, code, f"The Resource '{above_kind.arm_type}/{name}' under resource group '{group}' was not found."
        )


def check_references(inputs: dict[str, Any], resource_id: str, resources: Resources) -> None:
    """Refuse where the body names a resource that does not exist."""
    for found in references(inputs):
        if found.lower() not in resources:
            raise ArmError(
                400,
                "InvalidResourceReference",
                f"Resource {found} referenced by resource {resource_id} was not found. Please make sure that the "
                "referenced "
                "resource exists, and that both resources are in the same region.",
            )


def check_unchangeable(kind: ArmType, old: dict[str, Any], new: dict[str, Any], resource_id: str) -> None:
    """Refuse the change of what only a new resource can have. Old and new are outputs, so that defaults count."""
    if "location" in old and str(old["location"]).lower() != str(new.get("location")).lower():
        raise ArmError(
            409,
            "InvalidResourceLocation",
            f"The resource '{resource_id.rsplit('/', 1)[1]}' already exists in location '{old['location']}'. A "
            "resource with "
            f"the same name cannot be created in location '{new.get('location')}'. Please select a new resource name.",
        )
    for path in sorted(kind.create_only | kind.force_new):
        if _at(old, path) != _at(new, path) and not path.startswith(("location", "scope")):
            code = "PropertyChangeNotAllowed"
            if kind.token.endswith(":RoleAssignment"):
                code = "RoleAssignmentUpdateNotPermitted"
            path = path if path.startswith("properties.") else f"properties.{path}"
            raise ArmError(400, code, f"Changing property '{path}' is not allowed.")


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def check_rules(
    kind: ArmType, resource: dict[str, Any], old: dict[str, Any] | None, resources: Resources, now: float
) -> None:
    """Refuse what this type's own rules forbid. `resource` has id, name, inputs; `old` is what was there before."""
    check = _RULES.get(kind.token.removeprefix("azure-native:"))
    if check is not None:
        check(resource, old, resources, now)


def _role_assignment(resource: dict[str, Any], old: Any, resources: Resources, now: float) -> None:
    inputs = resource["inputs"]
    if old is None:
        for other in resources.values():
            same = ("scope", "principalId", "roleDefinitionId")
            if other["token"].endswith(":RoleAssignment") and all(
                str(other["inputs"][key]).strip("/").lower() == str(inputs[key]).strip("/").lower() for key in same
            ):
                raise ArmError(409, "RoleAssignmentExists", "The role assignment already exists.")
    if inputs.get("principalType"):
        return
    for other in resources.values():
        if inputs["principalId"] == arm_outputs.principal(other) and now - other["made"] < other.get("lag_s", 0):
            raise ArmError(
                400,
                "PrincipalNotFound",
                f"Principal {inputs['principalId'].replace('-', '')} does not exist in the directory "
                f"{arm_outputs.TENANT}. "
                "Check that you have the correct principal ID. If you are creating this principal and then immediately "
                "assigning a role, this error might be related to a replication delay. In this case, set the role "
                "assignment "
                "principalType property to a value, such as ServicePrincipal, User, or Group.",
            )


def _cluster(resource: dict[str, Any], old: Any, resources: Resources, now: float) -> None:
    inputs = resource["inputs"]
    profiles = inputs.get("agentPoolProfiles") or []
    below = f"{resource['id'].lower()}/agentpools/"
    if old is None and not any(profile.get("mode") == "System" for profile in profiles):
        raise ArmError(400, "InvalidParameter", "Managed cluster must have at least one agent pool of mode System.")
    for profile in profiles:
        if old is not None and below + profile["name"].lower() not in resources:
            raise ArmError(
                400,
                "BadRequest",
                "A new agent pool was introduced. Adding agent pools to an existing cluster is not allowed through "
                "managed "
                "cluster operations. For agent pool specific change, please use per agent pool operations: "
                "https://aka.ms/agent-pool-rest-api",
            )
        _pool_shape(profile)
    if inputs.get("disableLocalAccounts") and not inputs.get("aadProfile"):
        raise ArmError(400, "BadRequest", "Local accounts can only be disabled for clusters with AAD integration.")
    access = inputs.get("apiServerAccessProfile") or {}
    if access.get("enablePrivateCluster") and access.get("authorizedIPRanges"):
        raise ArmError(400, "InvalidParameter", "authorizedIPRanges cannot be used together with a private cluster.")
    issuer_was_on = old is not None and (old["inputs"].get("oidcIssuerProfile") or {}).get("enabled")
    if issuer_was_on and not (inputs.get("oidcIssuerProfile") or {}).get("enabled"):
        raise ArmError(400, "OIDCIssuerFeatureCannotBeDisabled", "OIDC issuer feature cannot be disabled.")


def _pool(resource: dict[str, Any], old: Any, resources: Resources, now: float) -> None:
    _pool_shape(resource["inputs"])


def _pool_shape(inputs: dict[str, Any]) -> None:
    name = inputs.get("agentPoolName") or inputs.get("name")
    least, most, count = inputs.get("minCount"), inputs.get("maxCount"), inputs.get("count")
    spot = inputs.get("scaleSetPriority") == "Spot"
    system = inputs.get("mode") == "System"
    wrong = None
    if inputs.get("enableAutoScaling") and (least is None or most is None):
        wrong = "minCount and maxCount are required when enableAutoScaling is true"
    elif not inputs.get("enableAutoScaling") and (least is not None or most is not None):
        wrong = "minCount and maxCount are only allowed when enableAutoScaling is true"
    elif least is not None and most is not None and least > most:
        wrong = f"minCount {least} is larger than maxCount {most}"
    elif inputs.get("enableAutoScaling") and count is not None and not least <= count <= most:
        wrong = f"count {count} is not between minCount {least} and maxCount {most}"
    elif system and (least == 0 or count == 0):
        wrong = "a system pool needs at least one node"
    elif system and spot:
        wrong = "a system pool cannot be of priority Spot"
    elif not spot and (inputs.get("spotMaxPrice") is not None or inputs.get("scaleSetEvictionPolicy")):
        wrong = "spotMaxPrice and scaleSetEvictionPolicy are only allowed when scaleSetPriority is Spot"
    elif inputs.get("gpuInstanceProfile") and not str(inputs.get("vmSize")).startswith(("Standard_NC", "Standard_ND")):
        wrong = f"gpuInstanceProfile is not supported by {inputs.get('vmSize')}"
    if wrong:
        raise ArmError(400, "InvalidParameter", f"The agent pool '{name}' is invalid: {wrong}.")


def _budget(resource: dict[str, Any], old: Any, resources: Resources, now: float) -> None:
    start = str((resource["inputs"].get("timePeriod") or {}).get("startDate"))
    if not re.match(r"\d{4}-\d{2}-01", start):
        raise ArmError(400, "400", f"Start date {start} is invalid: it must be the first of a month.")
    if len(resource["inputs"].get("notifications") or {}) > 5:
        raise ArmError(400, "400", "A budget can have at most 5 notifications.")


def _federation(resource: dict[str, Any], old: Any, resources: Resources, now: float) -> None:
    above = resource["id"].lower().rsplit("/", 1)[0]
    for key, other in resources.items():
        same = all(other["inputs"].get(part) == resource["inputs"][part] for part in ("issuer", "subject"))
        if key.startswith(f"{above}/") and key != resource["id"].lower() and same:
            raise ArmError(
                409, "Conflict", "There is already a federated identity credential with this issuer and subject."
            )


def _vault(resource: dict[str, Any], old: Any, resources: Resources, now: float) -> None:
    was_on = old is not None and old["inputs"]["properties"].get("enablePurgeProtection")
    if was_on and not resource["inputs"]["properties"].get("enablePurgeProtection"):
        raise ArmError(
            400,
            "BadRequest",
            'The property "enablePurgeProtection" cannot be set to false. Enabling it is irreversible.',
        )


def _private_endpoint(resource: dict[str, Any], old: Any, resources: Resources, now: float) -> None:
    if not resource["inputs"].get("subnet"):
        raise ArmError(400, "InvalidRequestFormat", "A private endpoint needs a subnet.")


_RULES: dict[str, Callable[[dict[str, Any], Any, Resources, float], None]] = {
    "authorization:RoleAssignment": _role_assignment,
    "containerservice:ManagedCluster": _cluster,
    "containerservice:AgentPool": _pool,
    "consumption:Budget": _budget,
    "managedidentity:FederatedIdentityCredential": _federation,
    "keyvault:Vault": _vault,
    "network:PrivateEndpoint": _private_endpoint,
}


def check_deletable(kind: ArmType, resource_id: str, resources: Resources) -> None:
    """Refuse the deletion of a subnet or group that is in use, of a zone with links, of the last system pool."""
    key = resource_id.lower()
    gone = {one for one in resources if one == key or one.startswith(f"{key}/")}
    if kind.token.endswith(":ResourceGroup"):
        return
    for one in sorted(gone):
        held = kind_of(one)
        if held is None or not held.token.endswith((":Subnet", ":NetworkSecurityGroup")):
            continue
        for other_key, other in sorted(resources.items()):
            if other_key not in gone and any(found.lower() == one for found in references(other["inputs"])):
                what = "Subnet" if held.token.endswith(":Subnet") else "NetworkSecurityGroup"
                raise ArmError(
                    400,
                    f"InUse{what}CannotBeDeleted",
                    f"{what} {resources[one]['name']} is in use by {other['id']} and cannot be deleted.",
                )
    if kind.token.endswith(":PrivateZone") and len(gone) > 1:
        raise ArmError(409, "CannotDeleteResource", "Can not delete resource before nested resources are deleted.")
    if kind.token.endswith(":AgentPool"):
        siblings = [one for other, one in resources.items() if other.startswith(key.rsplit("/", 1)[0]) and other != key]
        if not any(one["inputs"].get("mode") == "System" for one in siblings):
            raise ArmError(400, "OperationNotAllowed", "There has to be at least one system agent pool.")


def check_quota(path: Path | None, resource: dict[str, Any], resources: Resources, region: str) -> None:
    """Refuse a pool whose largest node count would need more vCPUs than the region's limit of its family.

    The file: {"limits": {family: vCPUs}, "sizes": {VM size: {"family": ..., "vcpus": ...}}}; of a spot pool the
    family is lowPriorityCores. A family without a limit is not limited.
    """
    if path is None or not path.exists():
        return
    quota = json.loads(path.read_text(encoding="utf-8"))

    def need(inputs: dict[str, Any]) -> tuple[str, int]:
        size = quota["sizes"].get(inputs.get("vmSize"))
        if size is None:
            return "", 0
        nodes = inputs["maxCount"] if inputs.get("enableAutoScaling") else inputs.get("count") or 1
        family = "lowPriorityCores" if inputs.get("scaleSetPriority") == "Spot" else size["family"]
        return family, nodes * size["vcpus"]

    family, required = need(resource["inputs"])
    if family not in quota["limits"]:
        return
    usage = sum(
        cores
        for key, other in resources.items()
        if other["token"].endswith(":AgentPool") and key != resource["id"].lower()
        for other_family, cores in [need(other["inputs"])]
        if other_family == family
    )
    if usage + required > quota["limits"][family]:
        raise quota_exceeded(family, quota["limits"][family], usage, required, region)
