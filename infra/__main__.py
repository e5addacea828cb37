"""What `pulumi up` makes, from top to bottom: network, identities, storage, secrets, cluster, objects, budget."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TypedDict

import pulumi
from pulumi_azure_native import authorization, resources

from infra.alerts import rule_groups
from infra.budget import Budget, BudgetArgs
from infra.cluster import Cluster, ClusterArgs
from infra.identity import Federation, FederationArgs, Identities, IdentitiesArgs
from infra.monitor import ClusterMonitor, ClusterMonitorArgs, Monitor, MonitorArgs
from infra.names import Names, names
from infra.network import Network, NetworkArgs
from infra.objects import Values, manifests
from infra.pools import GpuPools, GpuPoolsArgs
from infra.registry import Registry, RegistryArgs
from infra.release import Release, ReleaseArgs
from infra.roles import deployer_type
from infra.settings import (
    SECRETS,
    check_secrets,
    daily_cap_gb,
    grants,
    people_grants,
    read_plan,
    tasks,
    unbought,
    watched,
)
from infra.storage import Storage, StorageArgs
from infra.tags import tags
from infra.vault import Vault, VaultArgs
from planner.errors import PlannerError
from workloads.pods import NAMESPACE


class Place(TypedDict):
    """What every component is told of where its resources go and what they are called."""

    location: str
    resource_group_name: pulumi.Input[str]
    tags: Mapping[str, str]
    names: Names


def main() -> None:
    """The program. PlannerError for a plan that must not be applied, and for config that is missing or wrong."""
    config, stack = pulumi.Config("tonnage"), pulumi.get_stack()
    intent, lock = read_plan(config.get_object("intent"), config.get_object("plan"))
    secrets = {key: value for key in SECRETS if (value := config.get_secret(key)) is not None}
    check_secrets(lock, stack, secrets, [key for key in secrets if pulumi.runtime.is_config_secret(f"tonnage:{key}")])
    caller = authorization.get_client_config_output()
    caller_type = caller.client_id.apply(deployer_type)
    groups = [str(group_id) for group_id in intent.access.admin_group_object_ids]

    for sentence in unbought(lock):
        pulumi.warn(sentence)
    named, around, kinds = names(stack), lock.around, tasks(lock)
    tagged = tags(stack, around.posture, intent.tags)
    group = resources.ResourceGroup("group", resource_group_name=named.group, location=lock.region, tags=tagged)
    place = Place(location=lock.region, resource_group_name=group.name, tags=tagged, names=named)
    protect = around.posture == "prod"

    network = Network("network", NetworkArgs(**place, private_endpoints=around.cluster.private_endpoints or 0))
    identities = Identities(
        "identities",
        IdentitiesArgs(
            **place,
            subscription_id=caller.subscription_id,
            # a private cluster also ties its DNS zone to the network
            network_scope=network.vnet_id if around.private_cluster else network.nodes_subnet_id,
            workloads=kinds,
        ),
    )
    storage = Storage(
        "storage",
        StorageArgs(
            **place,
            around=around,
            subscription_id=caller.subscription_id,
            nodes_subnet_id=network.nodes_subnet_id,
            endpoints=network.endpoints,
            grants=[*grants(identities.workloads, lock), *people_grants(groups, caller.object_id, caller_type)],
            protect=protect,
            allowed_networks=intent.access.authorized_ip_ranges,
        ),
    )
    vault = Vault(
        "vault",
        VaultArgs(
            **place,
            around=around,
            tenant_id=caller.tenant_id,
            subscription_id=caller.subscription_id,
            nodes_subnet_id=network.nodes_subnet_id,
            endpoints=network.endpoints,
            secrets={SECRETS[key]: value for key, value in secrets.items()},
            readers={f"{kind}-reads-secrets": identity.principal_id for kind, identity in identities.workloads.items()},
            protect=protect,
        ),
    )
    registry = None
    if around.cluster.registry != "none":
        registry = Registry(
            "registry",
            RegistryArgs(
                **place,
                lock=lock,
                subscription_id=caller.subscription_id,
                endpoints=network.endpoints,
                kubelet_principal_id=identities.kubelet.principal_id,
            ),
        )
    monitor = Monitor(
        "monitor",
        MonitorArgs(
            **place,
            subscription_id=caller.subscription_id,
            daily_cap_gb=daily_cap_gb(lock),
            alert_emails=intent.alert_emails,
            grafana=around.cluster.grafana,
            grafana_admin_group_ids=groups,
        ),
    )
    cluster = Cluster(
        "cluster",
        ClusterArgs(
            **place,
            lock=lock,
            access=intent.access,
            nodes_subnet_id=network.nodes_subnet_id,
            control_plane=identities.control_plane,
            kubelet=identities.kubelet,
            workspace_id=monitor.workspace_id,
            # what else is made first gives Azure the minutes that it takes to heed a role
            roles=[*identities.roles, *storage.ready, *vault.ready, *(registry.ready if registry else ())],
            subscription_id=caller.subscription_id,
            deployer=caller.object_id,
            deployer_type=caller_type,
            resource_group_id=group.id,
            login=config.get("kubelogin") or "azurecli",
            apply_system_pool=config.get("systemPool") == "apply",
        ),
    )
    pools = GpuPools(
        "pools",
        GpuPoolsArgs(
            resource_group_name=group.name,
            tags=tagged,
            cluster_name=cluster.name,
            nodes_subnet_id=network.nodes_subnet_id,
            pools=lock.pools,
        ),
    )
    federation = Federation(
        "federation",
        FederationArgs(
            resource_group_name=group.name,
            issuer=cluster.issuer,
            namespace=NAMESPACE,
            accounts=[(workload.name, workload.task) for workload in lock.workloads],
            identities=identities.workloads,
        ),
    )
    ClusterMonitor(
        "cluster-monitor",
        ClusterMonitorArgs(
            **place,
            cluster_id=cluster.id,
            workspace_id=monitor.workspace_id,
            azure_monitor_workspace_id=monitor.azure_monitor_workspace_id,
            data_collection_endpoint_id=monitor.data_collection_endpoint_id,
            groups=rule_groups(watched(lock)),
            action_group_id=monitor.action_group_id,
            blob_service_id=storage.blob_service_id,
            vault_id=vault.vault_id,
        ),
    )
    Release(
        "release",
        ReleaseArgs(
            kubeconfig=cluster.kubeconfig,
            cluster_id=cluster.id,
            manifests=manifests(
                lock,
                Values(
                    client_ids={kind: identity.client_id for kind, identity in identities.workloads.items()},
                    tenant_id=caller.tenant_id,
                    vault_name=vault.vault_name,
                    secrets=[SECRETS[key] for key in secrets],
                    resource_group_name=group.name,
                    storage_account=storage.account_name,
                    train_image=registry.train_image if registry else None,
                ),
            ),
            after=[
                *cluster.ready,
                *pools.pools.values(),
                *federation.credentials,
                *storage.ready,
                *vault.ready,
                *(registry.ready if registry else ()),
            ],
        ),
    )
    if intent.approved_usd_per_month is not None:
        Budget(
            "budget",
            BudgetArgs(
                names=named,
                subscription_id=caller.subscription_id,
                amount_usd_per_month=intent.approved_usd_per_month,
                start=datetime.now(UTC).date().replace(day=1),
                resource_groups=[group.name, named.node_group],
                emails=intent.alert_emails,
                action_group_id=monitor.action_group_id,
            ),
        )

    pulumi.export("resource_group", group.name)
    pulumi.export("cluster", cluster.name)
    pulumi.export("storage_account", storage.account_name)
    pulumi.export("vault", vault.vault_name)
    pulumi.export("registry", registry.login_server if registry else None)
    pulumi.export("prometheus", monitor.prometheus_query_endpoint)
    pulumi.export("planned_usd_per_month", f"{lock.usd:f}")


try:
    main()
except PlannerError as error:
    raise pulumi.RunError(str(error)) from error
