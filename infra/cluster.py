"""The AKS cluster with its system pool, its maintenance windows, and the way in for Kubernetes objects."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pulumi
import yaml
from pulumi_azure_native import authorization, managedidentity
from pulumi_azure_native import containerservice as aks

from infra.names import Names
from infra.roles import role_assignment
from planner.errors import PlannerError
from planner.plan.intent import Access
from planner.plan.lock import Around, Lock

POD_CIDR, SERVICE_CIDR, DNS_SERVICE_IP = "10.244.0.0/16", "10.0.0.0/16", "10.0.0.10"
LOGINS = ("azurecli", "workloadidentity", "spn", "msi", "azd")
SYSTEM = "system"
SYSTEM_TAINT = "CriticalAddonsOnly=true:NoSchedule"
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class ClusterArgs:
    """lock: the plan; access: of the intent; nodes_subnet_id: where nodes join; workspace_id: Log Analytics

    roles: assignments that must be there before the cluster can start
    deployer, deployer_type: object id and kind of whoever runs the program, who is made its administrator where the
    intent names no group
    login: how programs log in, one of LOGINS; apply_system_pool: change the system pool where the plan has changed it
    """

    location: str
    resource_group_name: pulumi.Input[str]
    tags: Mapping[str, str]
    names: Names
    lock: Lock
    access: Access
    nodes_subnet_id: pulumi.Input[str]
    control_plane: managedidentity.UserAssignedIdentity
    kubelet: managedidentity.UserAssignedIdentity
    workspace_id: pulumi.Input[str]
    roles: Sequence[pulumi.Resource]
    subscription_id: pulumi.Input[str]
    deployer: pulumi.Input[str]
    deployer_type: pulumi.Input[authorization.PrincipalType]
    resource_group_id: pulumi.Input[str]
    login: str
    apply_system_pool: bool = False


class Cluster(pulumi.ComponentResource):
    """The cluster without its GPU pools.

    id, name, issuer: its id, name and OIDC issuer; kubeconfig: for programs, a secret
    ready: what Kubernetes objects must wait for
    PlannerError for a login that kubelogin does not have.
    """

    id: pulumi.Output[str]
    name: pulumi.Output[str]
    issuer: pulumi.Output[str]
    kubeconfig: pulumi.Output[str]
    ready: list[pulumi.Resource]

    def __init__(self, name: str, args: ClusterArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("tonnage:infra:Cluster", name, {}, opts)
        if args.login not in LOGINS:
            raise PlannerError(f"tonnage:kubelogin is {args.login!r}: set it to one of {', '.join(LOGINS)}")
        administrator = self._administrator(args)  # before the cluster: it takes minutes until Azure heeds a role
        around, tier = args.lock.around, str(args.lock.around.cluster.tier)
        cluster = aks.ManagedCluster(
            "cluster",
            resource_name_=args.names.cluster,
            location=args.location,
            resource_group_name=args.resource_group_name,
            node_resource_group=args.names.node_group,
            node_resource_group_profile=aks.ManagedClusterNodeResourceGroupProfileArgs(restriction_level="ReadOnly"),
            tags=args.tags,
            dns_prefix=args.names.dns_prefix,
            kubernetes_version=args.lock.platform.kubernetes_version,
            sku=aks.ManagedClusterSKUArgs(name="Base", tier=tier.capitalize()),
            support_plan="AKSLongTermSupport" if tier == "premium" else "KubernetesOfficial",
            identity=aks.ManagedClusterIdentityArgs(
                type=aks.ResourceIdentityType.USER_ASSIGNED, user_assigned_identities=[args.control_plane.id]
            ),
            identity_profile={
                "kubeletidentity": aks.UserAssignedIdentityArgs(
                    resource_id=args.kubelet.id,
                    client_id=args.kubelet.client_id,
                    object_id=args.kubelet.principal_id,
                )
            },
            enable_rbac=True,
            disable_local_accounts=True,
            aad_profile=aks.ManagedClusterAADProfileArgs(
                managed=True,
                enable_azure_rbac=True,
                admin_group_object_ids=[str(group) for group in args.access.admin_group_object_ids],
            ),
            api_server_access_profile=_api_server(around, args.access),
            oidc_issuer_profile=aks.ManagedClusterOIDCIssuerProfileArgs(enabled=True),
            security_profile=_security(around, args.workspace_id),
            network_profile=aks.ContainerServiceNetworkProfileArgs(
                network_plugin="azure",
                network_plugin_mode="overlay",
                network_dataplane="cilium",
                network_policy="cilium",
                load_balancer_sku="standard",
                outbound_type="loadBalancer",
                pod_cidr=POD_CIDR,
                service_cidr=SERVICE_CIDR,
                dns_service_ip=DNS_SERVICE_IP,
            ),
            agent_pool_profiles=[_system_pool(around, args)],
            auto_scaler_profile=aks.ManagedClusterPropertiesAutoScalerProfileArgs(
                expander=aks.Expander.PRIORITY
                if any(pool.fallback for pool in args.lock.pools)
                else aks.Expander.LEAST_WASTE,
                scan_interval="10s",
                scale_down_unneeded_time="10m",  # the idle time that the bill counts
                scale_down_delay_after_add="10m",
                max_node_provision_time="20m",  # a GPU machine and its driver take longer than the default allows
                skip_nodes_with_local_storage="false",  # caches in emptyDir would keep a GPU machine for ever
            ),
            auto_upgrade_profile=aks.ManagedClusterAutoUpgradeProfileArgs(
                upgrade_channel=aks.UpgradeChannel.PATCH,
                node_os_upgrade_channel=aks.NodeOSUpgradeChannel.NODE_IMAGE,
            ),
            workload_auto_scaler_profile=aks.ManagedClusterWorkloadAutoScalerProfileArgs(
                keda=aks.ManagedClusterWorkloadAutoScalerProfileKedaArgs(enabled=True)
            ),
            storage_profile=aks.ManagedClusterStorageProfileArgs(
                blob_csi_driver=aks.ManagedClusterStorageProfileBlobCSIDriverArgs(enabled=True),
                disk_csi_driver=aks.ManagedClusterStorageProfileDiskCSIDriverArgs(enabled=True),
                file_csi_driver=aks.ManagedClusterStorageProfileFileCSIDriverArgs(enabled=False),
                snapshot_controller=aks.ManagedClusterStorageProfileSnapshotControllerArgs(enabled=False),
            ),
            azure_monitor_profile=aks.ManagedClusterAzureMonitorProfileArgs(
                metrics=aks.ManagedClusterAzureMonitorProfileMetricsArgs(enabled=True)
            ),
            metrics_profile=aks.ManagedClusterMetricsProfileArgs(
                cost_analysis=aks.ManagedClusterCostAnalysisArgs(enabled=tier != "free")  # the Free tier has none
            ),
            addon_profiles={
                "azurepolicy": aks.ManagedClusterAddonProfileArgs(enabled=True),
                "azureKeyvaultSecretsProvider": aks.ManagedClusterAddonProfileArgs(
                    enabled=True, config={"enableSecretRotation": "true", "rotationPollInterval": "2m"}
                ),
                "omsagent": aks.ManagedClusterAddonProfileArgs(
                    enabled=True,
                    config={"logAnalyticsWorkspaceResourceID": args.workspace_id, "useAADAuth": "true"},
                ),
            },
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=[*args.roles, *administrator],
                # Azure lists every pool there, the GPU pools too; and a change to one sets all of them to Scaling
                ignore_changes=None if args.apply_system_pool else ["agentPoolProfiles"],
                custom_timeouts=pulumi.CustomTimeouts(create="40m", update="60m"),
            ),
        )
        cluster.agent_pool_profiles.apply(lambda profiles: _compare(profiles, around))
        self.id = cluster.id
        self.name = cluster.name
        self.issuer = cluster.oidc_issuer_profile.apply(_issuer)
        self.kubeconfig = _kubeconfig(cluster, args)
        self.ready = [*self._maintenance(args), *administrator]
        self.register_outputs({"name": self.name, "issuer": self.issuer})

    def _maintenance(self, args: ClusterArgs) -> list[pulumi.Resource]:
        """The window for upgrades of the control plane, and the same for images of the nodes."""
        start, end = args.lock.around.maintenance.start_minute, args.lock.around.maintenance.end_minute
        window = aks.MaintenanceWindowArgs(
            schedule=aks.ScheduleArgs(
                weekly=aks.WeeklyScheduleArgs(day_of_week=DAYS[start // 1440 % 7], interval_weeks=1)
            ),
            start_time=f"{start % 1440 // 60:02d}:{start % 60:02d}",
            duration_hours=(end - start) // 60,
            utc_offset="+00:00",
        )
        made: list[pulumi.Resource] = []
        for config in ("aksManagedAutoUpgradeSchedule", "aksManagedNodeOSUpgradeSchedule"):
            made.append(
                aks.MaintenanceConfiguration(
                    config,
                    config_name=config,
                    resource_group_name=args.resource_group_name,
                    resource_name_=self.name,
                    maintenance_window=window,
                    opts=pulumi.ResourceOptions(parent=self, depends_on=made[-1:]),
                )
            )
        return made

    def _administrator(self, args: ClusterArgs) -> list[pulumi.Resource]:
        """Somebody must be able to apply objects: members of the intent's groups, else who made the cluster."""
        if args.access.admin_group_object_ids:
            return []
        return [
            role_assignment(
                "deployer-administers-cluster",
                stack=args.names.stack,
                role="Azure Kubernetes Service RBAC Cluster Admin",
                scope=args.resource_group_id,
                principal_id=args.deployer,
                subscription_id=args.subscription_id,
                parent=self,
                principal_type=args.deployer_type,
                once=True,
            )
        ]


def _compare(profiles: Sequence[aks.outputs.ManagedClusterAgentPoolProfileResponse] | None, around: Around) -> None:
    """Says so where the system pool is not what the plan pays for: it is changed only when that is asked for."""
    for pool in profiles or ():
        there, planned = (pool.count, pool.vm_size), (around.cluster.system_nodes, around.cluster.system_sku)
        if pool.name == SYSTEM and there != planned:
            pulumi.warn(
                f"the system pool is {there[0]} x {there[1]} and the plan says {planned[0]} x {planned[1]}: run `pulumi"
                " up -c tonnage:systemPool=apply` at a quiet hour, for it sets all pools to Scaling"
            )


def _issuer(profile: aks.outputs.ManagedClusterOIDCIssuerProfileResponse | None) -> str:
    if profile is None or not profile.issuer_url:
        raise PlannerError("the cluster has no OIDC issuer: Azure must enable it before workloads can have identities")
    return profile.issuer_url


def _api_server(around: Around, access: Access) -> aks.ManagedClusterAPIServerAccessProfileArgs:
    """Inside the network alone, or from the addresses that the intent names: Azure takes one of the two."""
    if around.private_cluster:
        return aks.ManagedClusterAPIServerAccessProfileArgs(
            enable_private_cluster=True,
            enable_private_cluster_public_fqdn=True,  # the name resolves everywhere, to an address inside
            private_dns_zone="system",
            disable_run_command=True,
        )
    return aks.ManagedClusterAPIServerAccessProfileArgs(
        enable_private_cluster=False,
        authorized_ip_ranges=[str(network) for network in access.authorized_ip_ranges] or None,
        disable_run_command=True,
    )


def _security(around: Around, workspace_id: pulumi.Input[str]) -> aks.ManagedClusterSecurityProfileArgs:
    defender = aks.ManagedClusterSecurityProfileDefenderArgs(
        log_analytics_workspace_resource_id=workspace_id,
        security_monitoring=aks.ManagedClusterSecurityProfileDefenderSecurityMonitoringArgs(enabled=True),
    )
    return aks.ManagedClusterSecurityProfileArgs(
        workload_identity=aks.ManagedClusterSecurityProfileWorkloadIdentityArgs(enabled=True),
        image_cleaner=aks.ManagedClusterSecurityProfileImageCleanerArgs(enabled=True, interval_hours=168),
        defender=defender if around.cluster.defender else None,
    )


def _system_pool(around: Around, args: ClusterArgs) -> aks.ManagedClusterAgentPoolProfileArgs:
    """The one inline pool: as many machines as the bill counts. Changing it would touch every other pool."""
    return aks.ManagedClusterAgentPoolProfileArgs(
        name=SYSTEM,
        mode=aks.AgentPoolMode.SYSTEM,
        type=aks.AgentPoolType.VIRTUAL_MACHINE_SCALE_SETS,
        count=around.cluster.system_nodes,
        vm_size=around.cluster.system_sku,
        availability_zones=list(around.cluster.zones) or None,
        os_type="Linux",
        os_sku="Ubuntu",
        os_disk_type="Managed",
        os_disk_size_gb=128,
        max_pods=110,
        vnet_subnet_id=args.nodes_subnet_id,
        node_taints=[SYSTEM_TAINT],
        enable_node_public_ip=False,
        security_profile=aks.AgentPoolSecurityProfileArgs(ssh_access=aks.AgentPoolSSHAccess.DISABLED),
        upgrade_settings=aks.AgentPoolUpgradeSettingsArgs(max_surge="1"),  # the one more that the quota asks for
        tags=args.tags,
    )


def _kubeconfig(cluster: aks.ManagedCluster, args: ClusterArgs) -> pulumi.Output[str]:
    """The kubeconfig of a cluster without local accounts, for programs: a secret."""
    found = aks.list_managed_cluster_user_credentials_output(
        format="exec", resource_group_name=args.resource_group_name, resource_name=cluster.name
    )
    return pulumi.Output.secret(found.apply(lambda answer: for_programs(_first(answer.kubeconfigs), args.login)))


def _first(kubeconfigs: Sequence[aks.outputs.CredentialResultResponse]) -> str:
    if not kubeconfigs:
        raise PlannerError("Azure gave no kubeconfig for the cluster: check that it runs, then try again")
    return base64.b64decode(kubeconfigs[0].value).decode()


def for_programs(text: str, login: str) -> str:
    """A kubeconfig whose kubelogin takes a login that exists already, where Azure's asks a person for a device code.

    PlannerError for a kubeconfig whose users do not log in through kubelogin.
    """
    config = yaml.safe_load(text)
    for user in config["users"]:
        command = user["user"].get("exec")
        if command is None or command.get("command") != "kubelogin":
            raise PlannerError(
                "the cluster's kubeconfig does not log in through kubelogin: keep Entra ID on and local accounts off"
            )
        arguments = command["args"]
        server = arguments[arguments.index("--server-id") + 1]
        command["args"] = ["get-token", "--login", login, "--server-id", server]
    return str(yaml.safe_dump(config, sort_keys=False))
