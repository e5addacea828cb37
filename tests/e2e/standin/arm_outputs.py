"""What ARM adds to a resource: endpoints, identities, states. Everything follows from the id and how often it was
made.
"""

import copy
import uuid
from collections.abc import Callable
from typing import Any

from standin.arm_table import TYPES
from standin.arm_types import ArmType

TENANT = "11111111-2222-4333-8444-555555555555"
DEPLOYER = "0d6d4b3c-9b1f-4f2e-8f58-6d1c2a3b4c5d"
"""The object id of who runs the program."""
SUBSCRIPTION = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"

ADDONS_WITH_IDENTITY = {
    "azureKeyvaultSecretsProvider": "azurekeyvaultsecretsprovider",
    "azurepolicy": "azurepolicy",
    "omsagent": "omsagent",
}
NETWORK_DEFAULTS = {
    "dnsServiceIP": "10.0.0.10",
    "ipFamilies": ["IPv4"],
    "loadBalancerSku": "standard",
    "networkPlugin": "azure",
    "outboundType": "loadBalancer",
    "serviceCidr": "10.0.0.0/16",
}


def outputs(kind: ArmType, resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The resource as a GET shows it, in the SDK's shape. `resources` is all that exists, by lower-case id."""
    body = {
        name: part
        for name, part in resource["inputs"].items()
        if name not in kind.path_inputs and not name.startswith("__") and part is not None
    }
    if "scope" in kind.path_inputs:
        body["scope"] = "/" + resource["inputs"]["scope"].strip("/")
    shown = merged(kind.defaults, copy.deepcopy(body))
    for path in kind.write_only:
        _remove(shown, path.split("."))
    shown |= {"name": resource["name"], "type": kind.arm_type, "azureApiVersion": kind.api_version}
    add = _ADDITIONS.get(kind.token.removeprefix("azure-native:"))
    if add is not None:
        add(shown, resource, resources)
    return shown


def principal(resource: dict[str, Any], part: str = "principal") -> str:
    """A GUID that stays while the resource lives and is another one when it is made anew."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{part}:{resource['id'].lower()}:{resource['generation']}"))


def merged(defaults: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Over with what only the defaults have, at every depth."""
    result = copy.deepcopy(defaults)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def _remove(value: dict[str, Any], path: list[str]) -> None:
    for key in path[:-1]:
        value = value.get(key, {})
    value.pop(path[-1], None)


def _etag(resource: dict[str, Any]) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{resource['id']}:{resource['write']}"))


def _identity(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    identity = shown.get("identity")
    if not isinstance(identity, dict):
        return
    if "SystemAssigned" in str(identity.get("type")):
        identity |= {"principalId": principal(resource), "tenantId": TENANT}
    if isinstance(identity.get("userAssignedIdentities"), list):
        identity["userAssignedIdentities"] = {
            one: {
                "clientId": _assigned(one, resources)["clientId"],
                "principalId": _assigned(one, resources)["objectId"],
            }
            for one in identity["userAssignedIdentities"]
        }


def _assigned(identity_id: str, resources: dict[str, dict[str, Any]]) -> dict[str, str]:
    found = resources.get(identity_id.lower(), {"id": identity_id, "generation": 0})
    return {"resourceId": identity_id, "clientId": principal(found, "client"), "objectId": principal(found)}


def _state(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    shown["provisioningState"] = resource.get("state", "Succeeded")
    _identity(shown, resource, resources)


def _network(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    _state(shown, resource, resources)
    shown["etag"] = f'W/"{_etag(resource)}"'
    shown["resourceGuid"] = principal(resource, "guid")
    if resource["token"].endswith(":VirtualNetwork"):
        below = f"{resource['id'].lower()}/subnets/"
        shown["subnets"] = [
            {"id": one["id"], "name": one["name"]} for key, one in resources.items() if _under(key, below)
        ]


def _under(key: str, prefix: str) -> bool:
    return key.startswith(prefix) and "/" not in key[len(prefix) :]


def _private_endpoint(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    _state(shown, resource, resources)
    shown["networkInterfaces"] = [
        {"id": resource["id"].rsplit("/", 2)[0] + f"/networkInterfaces/{resource['name']}.nic"}
    ]
    for connection in shown.get("privateLinkServiceConnections", []):
        connection.setdefault("privateLinkServiceConnectionState", {"status": "Approved", "actionsRequired": "None"})


def _deployment(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    shown["properties"] |= {
        "provisioningState": resource.get("state", "Succeeded"),
        "correlationId": principal(resource, f"deployment {resource['write']}"),
    }


def _user_identity(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    shown |= {"principalId": principal(resource), "clientId": principal(resource, "client"), "tenantId": TENANT}


def _cluster(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    _state(shown, resource, resources)
    location, name, group = shown["location"], resource["name"], resource["id"].split("/")[4]
    version = shown.setdefault("kubernetesVersion", "1.34")
    shown["currentKubernetesVersion"] = version if version.count(".") == 2 else f"{version}.2"
    shown.setdefault("dnsPrefix", f"{name}-dns")
    shown.setdefault("nodeResourceGroup", f"MC_{group}_{name}_{location}")
    host = f"{shown.get('fqdnSubdomain') or shown['dnsPrefix']}-{principal(resource, 'dns')[:8]}"
    access = shown.get("apiServerAccessProfile", {})
    if access.get("enablePrivateCluster"):
        shown["privateFQDN"] = f"{host}.{principal(resource, 'zone')}.privatelink.{location}.azmk8s.io"
    if not access.get("enablePrivateCluster") or access.get("enablePrivateClusterPublicFQDN"):
        shown["fqdn"] = f"{host}.hcp.{location}.azmk8s.io"
    shown["azurePortalFQDN"] = f"{host}.portal.hcp.{location}.azmk8s.io"
    shown["resourceUID"] = principal(resource, "uid").replace("-", "")
    shown["eTag"] = _etag(resource)
    shown["maxAgentPools"] = 100
    shown["powerState"] = {"code": "Running"}
    shown["networkProfile"] = merged(NETWORK_DEFAULTS, shown.get("networkProfile", {}))
    if shown.get("oidcIssuerProfile", {}).get("enabled"):
        issuer = f"https://{location}.oic.prod-aks.azure.com/{TENANT}/{principal(resource, 'issuer')}/"
        shown["oidcIssuerProfile"]["issuerURL"] = issuer
    node_group = f"/subscriptions/{resource['id'].split('/')[2]}/resourcegroups/{shown['nodeResourceGroup']}"
    own = f"{node_group}/providers/Microsoft.ManagedIdentity/userAssignedIdentities"
    profile = shown.setdefault("identityProfile", {"kubeletidentity": {"resourceId": f"{own}/{name}-agentpool"}})
    for part in profile.values():
        part |= {key: value for key, value in _assigned(part["resourceId"], resources).items() if key != "resourceId"}
    for addon, settings in shown.get("addonProfiles", {}).items():
        if settings.get("enabled") and addon in ADDONS_WITH_IDENTITY:
            settings["identity"] = _assigned(f"{own}/{ADDONS_WITH_IDENTITY[addon]}-{name}", resources)
    pools = [one for key, one in resources.items() if _under(key, f"{resource['id'].lower()}/agentpools/")]
    shown["agentPoolProfiles"] = [_profile(pool, resources) for pool in sorted(pools, key=lambda one: one["made"])]


def _profile(pool: dict[str, Any], resources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    shown = outputs(TYPES[pool["token"]], pool, resources)
    return {key: value for key, value in shown.items() if key != "azureApiVersion"}


def _pool(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    _state(shown, resource, resources)
    cluster = resources.get(resource["id"].lower().rsplit("/", 2)[0], {"inputs": {}})
    version = shown.setdefault("orchestratorVersion", cluster["inputs"].get("kubernetesVersion") or "1.34")
    shown["currentOrchestratorVersion"] = version if version.count(".") == 2 else f"{version}.2"
    shown["nodeImageVersion"] = "AKSUbuntu-2204gen2containerd-202611.01.0"
    shown["type"] = resource["inputs"].get("type") or "VirtualMachineScaleSets"
    shown["eTag"] = _etag(resource)
    shown.setdefault("osDiskType", "Managed")
    shown.setdefault("count", shown.get("minCount", 1))
    if shown.get("scaleSetPriority") == "Spot":
        # AKS marks spot nodes itself, and shows it.
        shown.setdefault("scaleSetEvictionPolicy", "Delete")
        shown.setdefault("spotMaxPrice", -1)
        shown["nodeLabels"] = {"kubernetes.azure.com/scalesetpriority": "spot"} | shown.get("nodeLabels", {})
        mark = "kubernetes.azure.com/scalesetpriority=spot:NoSchedule"
        shown["nodeTaints"] = sorted({mark, *shown.get("nodeTaints", [])})


def _storage(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    _state(shown, resource, resources)
    parts = {"blob": "blob", "dfs": "dfs", "file": "file", "queue": "queue", "table": "table"}
    shown["primaryEndpoints"] = {
        key: f"https://{resource['name']}.{part}.core.windows.net/" for key, part in parts.items()
    }
    shown |= {"primaryLocation": shown["location"], "statusOfPrimary": "available"}
    shown["sku"] = shown["sku"] | {"tier": shown["sku"]["name"].split("_")[0]}


def _vault(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    shown["properties"] |= {
        "vaultUri": f"https://{resource['name'].lower()}.vault.azure.net/",
        "provisioningState": resource.get("state", "Succeeded"),
    }


def _secret(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    uri = f"https://{resource['id'].split('/')[-3].lower()}.vault.azure.net/secrets/{resource['name']}"
    version = _etag(resource).replace("-", "")
    shown["properties"] |= {"secretUri": uri, "secretUriWithVersion": f"{uri}/{version}"}


def _registry(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    _state(shown, resource, resources)
    shown["loginServer"] = f"{resource['name'].lower()}.azurecr.io"
    shown["sku"] = shown["sku"] | {"tier": shown["sku"]["name"]}


def _task_run(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    _state(shown, resource, resources)
    shown["runResult"] = {"runId": _etag(resource)[:4], "status": "Succeeded", "name": _etag(resource)[:4]}


def _workspace(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    _state(shown, resource, resources)
    shown["customerId"] = principal(resource, "customer")


def _monitor_workspace(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    _state(shown, resource, resources)
    name, location, account = resource["name"], shown["location"], principal(resource, "account")
    managed = f"/subscriptions/{resource['id'].split('/')[2]}/resourceGroups/MA_{name}_{location}_managed/providers"
    shown["accountId"] = account
    shown["metrics"] = {
        "internalId": f"mac_{account}",
        "prometheusQueryEndpoint": f"https://{name.lower()}-{account[:4]}.{location}.prometheus.monitor.azure.com",
    }
    shown["defaultIngestionSettings"] = {
        "dataCollectionEndpointResourceId": f"{managed}/Microsoft.Insights/dataCollectionEndpoints/{name}",
        "dataCollectionRuleResourceId": f"{managed}/Microsoft.Insights/dataCollectionRules/{name}",
    }


def _collection_endpoint(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    _collection(shown, resource, resources)
    host = f"{resource['name'].lower()}-{principal(resource, 'dce')[:4]}.{shown['location']}-1"
    shown["configurationAccess"] = {"endpoint": f"https://{host}.handler.control.monitor.azure.com"}
    shown["logsIngestion"] = {"endpoint": f"https://{host}.ingest.monitor.azure.com"}
    shown["metricsIngestion"] = {"endpoint": f"https://{host}.metrics.ingest.monitor.azure.com"}


def _collection(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    _state(shown, resource, resources)
    shown["immutableId"] = f"dcr-{principal(resource, 'immutable').replace('-', '')}"
    shown["etag"] = _etag(resource)


def _grafana(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    _identity(shown, resource, resources)
    host = f"{resource['name'].lower()}-{principal(resource, 'grafana')[:8]}"
    shown["properties"] = shown.get("properties", {}) | {
        "endpoint": f"https://{host}.{shown['location']}.grafana.azure.com",
        "provisioningState": resource.get("state", "Succeeded"),
    }


def _budget(shown: dict[str, Any], resource: dict[str, Any], resources: dict[str, dict[str, Any]]) -> None:
    shown["eTag"] = f'"{_etag(resource)}"'
    shown["currentSpend"] = {"amount": 0, "unit": "USD"}


_ADDITIONS: dict[str, Callable[[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]], None]] = {
    "resources:Deployment": _deployment,
    "network:VirtualNetwork": _network,
    "network:Subnet": _network,
    "network:NetworkSecurityGroup": _network,
    "network:PrivateEndpoint": _private_endpoint,
    "network:PrivateDnsZoneGroup": _state,
    "privatedns:PrivateZone": _state,
    "privatedns:VirtualNetworkLink": _state,
    "managedidentity:UserAssignedIdentity": _user_identity,
    "containerservice:ManagedCluster": _cluster,
    "containerservice:AgentPool": _pool,
    "storage:StorageAccount": _storage,
    "keyvault:Vault": _vault,
    "keyvault:Secret": _secret,
    "containerregistry:Registry": _registry,
    "containerregistry:Task": _state,
    "containerregistry:TaskRun": _task_run,
    "operationalinsights:Workspace": _workspace,
    "monitor:AzureMonitorWorkspace": _monitor_workspace,
    "monitor:DataCollectionEndpoint": _collection_endpoint,
    "monitor:DataCollectionRule": _collection,
    "monitor:DataCollectionRuleAssociation": _collection,
    "dashboard:Grafana": _grafana,
    "consumption:Budget": _budget,
}
