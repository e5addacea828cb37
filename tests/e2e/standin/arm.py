"""A stand-in for Azure Resource Manager: PUT, GET and DELETE on what the store keeps, with ARM's refusals.

Work takes a moment, as ARM's does, so that operations that may not overlap are seen to overlap.
"""

import fnmatch
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from standin import arm_outputs, arm_rules, faults, templates, wire
from standin.arm_table import TYPES
from standin.arm_types import ArmType
from standin.faults import ArmError
from standin.store import Journal, Store, seal

WORK_S = {"FederatedIdentityCredential": 0.3, "AgentPool": 0.3, "ManagedCluster": 0.3, "Subnet": 0.2}
RETRIES = 40
CONFLICT_WAIT_S = 0.1


class Unfinished(Exception):
    """The provider stopped waiting: ARM has taken the request. `kept` tells whether it knows the resource's id by
    then.
    """

    def __init__(self, why: str, *, kept: bool) -> None:
        super().__init__(why)
        self.kept = kept


@dataclass
class Arm:
    """Azure as far as the stand-in is it. lag_s: how long a new principal is unknown to role assignments without a
    type.
    """

    store: Store
    journal: Journal
    faults_file: Path | None = None
    quota_file: Path | None = None
    lag_s: float = 60.0
    busy: dict[str, str] = field(default_factory=dict)
    mutex: threading.Lock = field(default_factory=threading.Lock)

    def resource_id(self, kind: ArmType, inputs: dict[str, Any]) -> str:
        """The ARM id that the inputs make."""
        made = kind.path.replace("{subscriptionId}", arm_outputs.SUBSCRIPTION)
        for name in kind.path_inputs:
            made = made.replace(f"{{{name}}}", str(inputs[name]).strip("/"))
        return made

    def get(self, resource_id: str) -> dict[str, Any] | None:
        """The outputs of a resource, None if there is none. Secrets are sealed."""
        resources = self.store.read()["resources"]
        found = resources.get(resource_id.lower())
        return arm_outputs.outputs(TYPES[found["token"]], found, resources) if found is not None else None

    def refuse_read(self, kind: ArmType, resource_id: str) -> None:
        """Raise the ArmError that a fault of operation "read" asks for."""
        self._refuse(self._faults("read", kind, resource_id.rsplit("/", 1)[1]), self._region(resource_id))

    def put(self, kind: ArmType, resource_id: str, inputs: dict[str, Any], cancel: threading.Event) -> None:
        """Create or update; ArmError where ARM refuses, Unfinished where the provider's wait ends before ARM's work."""
        exists = resource_id.lower() in self.store.read()["resources"]
        operation = "update" if exists else "create"
        name = resource_id.rsplit("/", 1)[1]
        met = self._faults(operation, kind, name)
        region = str(inputs.get("location") or self._region(resource_id))
        self._refuse(met, region)
        with self._exclusive(kind, resource_id):
            self._check(kind, resource_id, inputs, region)
            ended_early = self._work(kind, met, cancel)
            if ended_early and not kind.asynchronous:
                raise Unfinished("context canceled", kept=False)  # the request itself was broken off
            self._commit(kind, resource_id, inputs)
        for fault in met:
            if fault["fault"] == "timeout":
                raise Unfinished("context deadline exceeded", kept=True)
            if fault["fault"] == "lost":
                raise Unfinished(
                    f'Put "https://management.azure.com{resource_id}": read: connection reset by peer', kept=False
                )
        if ended_early:
            raise Unfinished("context canceled", kept=True)

    def delete(self, kind: ArmType, resource_id: str, cancel: threading.Event) -> None:
        """Delete with all that lies below; what is not there counts as deleted."""
        key = resource_id.lower()
        if key not in self.store.read()["resources"]:
            return
        met = self._faults("delete", kind, resource_id.rsplit("/", 1)[1])
        self._refuse(met, self._region(resource_id))
        with self._exclusive(kind, resource_id):
            arm_rules.check_deletable(kind, resource_id, self.store.read()["resources"])
            if self._work(kind, met, cancel):
                raise Unfinished("context canceled", kept=True)
            with self.store.edit() as state:
                for one in [one for one in state["resources"] if one == key or one.startswith(f"{key}/")]:
                    _remember_deleted(state, one)
                    del state["resources"][one]

    def _commit(self, kind: ArmType, resource_id: str, inputs: dict[str, Any]) -> None:
        key = resource_id.lower()
        with self.store.edit() as state:
            old = state["resources"].get(key)
            if old is None:
                state["generations"][key] = state["generations"].get(key, 0) + 1
                # What is made anew is no longer deleted, nor are the secrets of an older vault of the name.
                for gone in [one for one in state["deleted"] if one == f"{kind.token}:{key}" or f":{key}/" in one]:
                    del state["deleted"][gone]
            state["writes"] += 1
            state["resources"][key] = {
                "id": resource_id,
                "token": kind.token,
                "name": resource_id.rsplit("/", 1)[1],
                "inputs": seal(inputs),
                "generation": state["generations"][key],
                "write": state["writes"],
                "made": old["made"] if old else time.time(),
                "lag_s": self.lag_s,
            }
            if kind.token.endswith(":ManagedCluster"):
                self._commit_profiles(state, resource_id, wire.reveal(inputs))
            if kind.token.endswith(":Deployment"):
                for stated in templates.stated(wire.reveal(inputs), resource_id):
                    there = state["resources"][stated.resource_id.lower()]
                    kept = {name: there["inputs"][name] for name in stated.kind.path_inputs}
                    there |= {"inputs": {**stated.inputs, **kept}, "write": state["writes"]}

    def _commit_profiles(self, state: dict[str, Any], cluster_id: str, inputs: dict[str, Any]) -> None:
        """The inline pools of a cluster are pools as any other."""
        path_inputs = {name: inputs[name] for name in ("resourceGroupName", "resourceName")}
        for profile in inputs.get("agentPoolProfiles") or []:
            pool_id = f"{cluster_id}/agentPools/{profile['name']}"
            old = state["resources"].get(pool_id.lower())
            state["resources"][pool_id.lower()] = {
                "id": pool_id,
                "token": "azure-native:containerservice:AgentPool",
                "name": profile["name"],
                "inputs": {**profile, **path_inputs, "agentPoolName": profile["name"]},
                "generation": 1,
                "write": state["writes"],
                "made": old["made"] if old else time.time(),
                "lag_s": 0,
            }

    def _check(self, kind: ArmType, resource_id: str, inputs: dict[str, Any], region: str) -> None:
        state = self.store.read()
        resources, key, plain = state["resources"], resource_id.lower(), wire.reveal(inputs)
        arm_rules.check_parents(kind, resource_id, resources)
        arm_rules.check_references(
            {name: part for name, part in plain.items() if name not in kind.path_inputs}, resource_id, resources
        )
        old = resources.get(key)
        now = {"id": resource_id, "token": kind.token, "name": resource_id.rsplit("/", 1)[1], "inputs": plain}
        if old is None:
            _check_name_free(kind, resource_id, plain, state)
        else:
            entry = {**old, **now}
            before = arm_outputs.outputs(kind, old, resources)
            after = arm_outputs.outputs(kind, entry, {**resources, key: entry})
            arm_rules.check_unchangeable(kind, before, after, resource_id)
            self._check_profiles(resource_id, plain, resources)
        arm_rules.check_rules(kind, now, old, resources, time.time())
        if kind.token.endswith(":Deployment"):
            for stated in templates.stated(plain, resource_id):
                if stated.resource_id.lower() not in resources:
                    raise templates.refusal(f"the stand-in does not create {stated.resource_id} from a template.")
        if kind.token.endswith(":AgentPool"):
            arm_rules.check_quota(self.quota_file, now, resources, region)

    def _check_profiles(self, cluster_id: str, inputs: dict[str, Any], resources: dict[str, Any]) -> None:
        pool_kind = TYPES["azure-native:containerservice:AgentPool"]
        for profile in inputs.get("agentPoolProfiles") or []:
            old = resources.get(f"{cluster_id}/agentPools/{profile['name']}".lower())
            if old is not None:
                entry = {**old, "inputs": {**old["inputs"], **profile}}
                before = arm_outputs.outputs(pool_kind, old, resources)
                after = arm_outputs.outputs(pool_kind, entry, resources)
                arm_rules.check_unchangeable(pool_kind, before, after, old["id"])

    def _faults(self, operation: str, kind: ArmType, name: str) -> list[dict[str, Any]]:
        if self.faults_file is None:
            return []
        with self.store.edit() as state:
            return faults.due(self.faults_file, state["faults"], operation=operation, token=kind.token, name=name)

    @staticmethod
    def _refuse(met: list[dict[str, Any]], region: str) -> None:
        for fault in met:
            error = faults.refusal(fault, region)
            if error is not None:
                raise error

    def _region(self, resource_id: str) -> str:
        group = self.store.read()["resources"].get("/".join(resource_id.split("/")[:5]).lower())
        return str(group["inputs"].get("location")) if group is not None else "global"

    @contextmanager
    def _exclusive(self, kind: ArmType, resource_id: str) -> Iterator[None]:
        """Hold what may not be worked on twice at once; refuse as ARM does where it is held."""
        key = resource_id.lower().rsplit("/", 2)[0] if kind.exclusive == "parent" else resource_id.lower()
        with self.mutex:
            if kind.exclusive and key in self.busy:
                raise _conflict(kind, resource_id)
            if kind.exclusive:
                self.busy[key] = resource_id
        try:
            yield
        finally:
            if kind.exclusive:
                with self.mutex:
                    del self.busy[key]

    @staticmethod
    def _work(kind: ArmType, met: list[dict[str, Any]], cancel: threading.Event) -> bool:
        """Take the time that the work takes; whether the provider was cancelled meanwhile."""
        seconds = sum(float(fault["seconds"]) for fault in met if fault["fault"] == "slow")
        return cancel.wait(seconds or WORK_S.get(kind.token.rsplit(":", 1)[1], 0.02))


def _conflict(kind: ArmType, resource_id: str) -> ArmError:
    parent = resource_id.rsplit("/", 2)[0]
    if kind.token.endswith(":FederatedIdentityCredential"):
        return ArmError(
            409,
            "ConcurrentFederatedIdentityCredentialsWritesForSingleManagedIdentity",
            "Too many Federated Identity Credentials are written concurrently for the managed identity "
            f"'{parent}'. Concurrent Federated Identity Credentials writes under the same managed identity are not "
            "supported.",
        )
    if "ContainerService/" in kind.arm_type:
        return ArmError(
            409,
            "OperationNotAllowed",
            "Operation is not allowed: Another operation is in progress on the managed cluster or one of its agent "
            "pools, "
            "please wait for it to finish before starting a new operation.",
        )
    return ArmError(
        409, "AnotherOperationInProgress", f"Another operation on this or dependent resource {parent} is in progress."
    )


def _check_name_free(kind: ArmType, resource_id: str, inputs: dict[str, Any], state: dict[str, Any]) -> None:
    """Refuse a name that is taken anywhere (storage, vault, registry) or soft-deleted (vault, secret)."""
    name = resource_id.rsplit("/", 1)[1].lower()
    taken = {
        "storage:StorageAccount": ("StorageAccountAlreadyTaken", "The storage account named {} is already taken."),
        "keyvault:Vault": ("VaultAlreadyExists", "The vault name '{}' is already in use."),
        "containerregistry:Registry": ("AlreadyInUse", "The registry DNS name {}.azurecr.io is already in use."),
    }.get(kind.token.removeprefix("azure-native:"))
    others = [one for one in state["resources"].values() if one["token"] == kind.token]
    if taken is not None and any(one["name"].lower() == name for one in others):
        raise ArmError(409, taken[0], taken[1].format(name))
    recover = (inputs.get("properties") or {}).get("createMode") == "recover"
    if kind.token.endswith("keyvault:Vault") and not recover:
        pattern = f"{kind.token}:*/vaults/{name}"
        if any(fnmatch.fnmatchcase(one, pattern) for one in state["deleted"]):
            raise ArmError(
                409,
                "ConflictError",
                "A vault with the same name already exists in deleted state. You need to either recover or purge "
                "existing "
                "key vault. Follow this link https://go.microsoft.com/fwlink/?linkid=2149745 for more information.",
            )
    if f"{kind.token}:{resource_id.lower()}" in state["deleted"] and kind.token.endswith("keyvault:Secret"):
        raise ArmError(
            409,
            "Conflict",
            f"Secret {name} is currently in a deleted but recoverable state, and its name cannot be reused; in this "
            "state, "
            "the secret can only be recovered or purged.",
        )


def _remember_deleted(state: dict[str, Any], key: str) -> None:
    token = state["resources"][key]["token"]
    if token in ("azure-native:keyvault:Vault", "azure-native:keyvault:Secret"):
        state["deleted"][f"{token}:{key}"] = state["resources"][key]["id"]
