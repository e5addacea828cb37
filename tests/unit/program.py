"""The whole Pulumi program of a stack, run without Azure, as plain rows."""

from __future__ import annotations

import base64
import json
import runpy
from collections.abc import Mapping
from functools import cache
from typing import Any

from locks import ROOT, shipped
from recording import Row, record

from planner.plan import Intent
from planner.plan.lock import Lock

CANARY = "canary-3f9a-not-for-anybodys-eyes"
ISSUER = "https://eastus.oic.prod-aks.azure.com/tenant/issuer/"
KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://c:443", certificate-authority-data: Q0E=}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
users:
- name: u
  user: {exec: {command: kubelogin, args: [get-token, --server-id, app, --login, devicecode]}}
"""
CALLS = {
    "azure-native:authorization:getClientConfig": {
        "subscriptionId": "00000000-0000-0000-0000-000000000001",
        "tenantId": "tenant",
        "objectId": "deployer",
        "clientId": "04b07795-8ddb-461a-bbee-02f9e1bf7b46",  # of the Azure CLI
    },
    "azure-native:containerservice:listManagedClusterUserCredentials": {
        "kubeconfigs": [{"name": "u", "value": base64.b64encode(KUBECONFIG.encode()).decode()}]
    },
}
ANSWERS: dict[str, dict[str, Any]] = {
    "cluster": {
        "identity": {"type": "UserAssigned"},
        "oidcIssuerProfile": {"enabled": True, "issuerURL": ISSUER},
    },
    **{
        name: {"principalId": f"{name}-principal", "clientId": f"{name}-client"}
        for name in ("control-plane", "kubelet", "serve", "finetune")
    },
}


@cache
def program(stack: str) -> tuple[Row, ...]:
    """What the program registers for a shipped stack."""
    return tuple(run(*shipped(stack), stack))


def run(intent: Intent, lock: Lock, stack: str = "dev-32k", more: Mapping[str, Any] | None = None) -> list[Row]:
    """What the program registers for an intent and its plan; more: config in place of the usual."""
    wanted = json.loads(intent.model_dump_json(exclude_defaults=True))
    return run_config(
        {"tonnage:intent": wanted, "tonnage:plan": lock.plain(), "tonnage:apiKey": CANARY} | (more or {}), stack
    )


def run_config(
    config: Mapping[str, Any], stack: str = "dev-32k", secret: tuple[str, ...] = ("apiKey", "hfToken")
) -> list[Row]:
    """What the program registers with that config; secret: keys that are encrypted in the stack file."""
    from pulumi.runtime.config import set_all_config

    flat = {k: v if isinstance(v, str) else json.dumps(v) for k, v in config.items() if v is not None}

    def start() -> None:
        set_all_config(flat, [f"tonnage:{key}" for key in secret])
        runpy.run_path(str(ROOT / "infra"), run_name="__main__")

    return record(start, stack=stack, calls=CALLS, outputs=ANSWERS)
