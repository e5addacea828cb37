"""What is seen of the cluster and kept: a workspace for logs, one for metrics, the rules on them, and who hears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

import pulumi
from pulumi_azure_native import alertsmanagement, authorization, dashboard, monitor, operationalinsights

from infra.alerts import Alert, Recording, RuleGroup
from infra.names import Names, limited
from infra.roles import role_assignment
from planner.errors import PlannerError

RETENTION_DAYS = 30  # what Log Analytics keeps without a further charge

METRICS_STREAM = "Microsoft-PrometheusMetrics"
# what people look for in a failure; the other streams of Container insights repeat what Prometheus has, for more money
LOG_STREAMS = ("Microsoft-ContainerLogV2", "Microsoft-KubeEvents", "Microsoft-KubePodInventory")

# kube-audit is left out: it is kube-audit-admin and every read besides, and can cost more than the cluster
CLUSTER_LOGS = ("kube-audit-admin", "kube-controller-manager", "cluster-autoscaler", "guard")
BLOB_LOGS = ("StorageRead", "StorageWrite", "StorageDelete")
VAULT_LOGS = ("AuditEvent",)


@dataclass(frozen=True)
class MonitorArgs:
    """daily_cap_gb: of logs, after which Azure takes none until the next day; alert_emails: who hears of alerts

    grafana: whether there is a managed Grafana, which grafana_admin_group_ids (Entra ID groups) administer
    """

    location: str
    resource_group_name: pulumi.Input[str]
    tags: Mapping[str, str]
    names: Names
    subscription_id: pulumi.Input[str]
    daily_cap_gb: Decimal | int
    alert_emails: Sequence[str] = ()
    grafana: bool = False
    grafana_admin_group_ids: Sequence[str] = ()


class Monitor(pulumi.ComponentResource):
    """Where logs and metrics go; made before the cluster, which is told the ids.

    workspace_id, workspace_customer_id: of Log Analytics, as resource and as its queries name it
    azure_monitor_workspace_id, prometheus_query_endpoint: of managed Prometheus
    data_collection_endpoint_id: of its ingestion; action_group_id: None when nobody is to be told
    grafana_endpoint: None without Grafana
    PlannerError for a daily cap that is not above zero.
    """

    workspace_id: pulumi.Output[str]
    workspace_customer_id: pulumi.Output[str]
    azure_monitor_workspace_id: pulumi.Output[str]
    prometheus_query_endpoint: pulumi.Output[str]
    data_collection_endpoint_id: pulumi.Output[str]
    action_group_id: pulumi.Output[str] | None
    grafana_endpoint: pulumi.Output[str] | None

    def __init__(self, name: str, args: MonitorArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        if args.daily_cap_gb <= 0:
            raise PlannerError(
                f"a daily cap of {args.daily_cap_gb} GB would keep no log at all: state log_gb_per_month above 0 in the"
                " intent"
            )
        super().__init__("tonnage:infra:Monitor", name, {}, opts)
        child = pulumi.ResourceOptions(parent=self)
        workspace = operationalinsights.Workspace(
            "logs",
            workspace_name=args.names.of("Log Analytics workspace", "logs"),
            location=args.location,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            sku=operationalinsights.WorkspaceSkuArgs(name=operationalinsights.WorkspaceSkuNameEnum.PER_GB2018),
            retention_in_days=RETENTION_DAYS,
            workspace_capping=operationalinsights.WorkspaceCappingArgs(daily_quota_gb=float(args.daily_cap_gb)),
            features=operationalinsights.WorkspaceFeaturesArgs(
                disable_local_auth=True, enable_log_access_using_only_resource_permissions=True
            ),
            opts=child,
        )
        metrics = monitor.AzureMonitorWorkspace(
            "metrics",
            azure_monitor_workspace_name=args.names.of("Azure Monitor workspace", "metrics"),
            location=args.location,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            opts=child,
        )
        endpoint = monitor.DataCollectionEndpoint(
            "metrics-endpoint",
            data_collection_endpoint_name=args.names.of("data collection endpoint", "metrics"),
            location=args.location,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            kind=monitor.KnownDataCollectionEndpointResourceKind.LINUX,
            # a private way in needs an Azure Monitor private link scope; agents authenticate as the cluster either way
            network_acls=monitor.DataCollectionEndpointNetworkAclsArgs(
                public_network_access=monitor.KnownPublicNetworkAccessOptions.ENABLED
            ),
            opts=child,
        )
        self.workspace_id = workspace.id
        self.workspace_customer_id = workspace.customer_id
        self.azure_monitor_workspace_id = metrics.id
        self.prometheus_query_endpoint = metrics.metrics.prometheus_query_endpoint
        self.data_collection_endpoint_id = endpoint.id
        self.action_group_id = self._action_group(args).id if args.alert_emails else None
        self.grafana_endpoint = self._grafana(args, metrics.id) if args.grafana else None
        self.register_outputs(
            {"workspace_id": workspace.id, "prometheus_query_endpoint": self.prometheus_query_endpoint}
        )

    def _action_group(self, args: MonitorArgs) -> monitor.ActionGroup:
        return monitor.ActionGroup(
            "people",
            action_group_name=args.names.of("action group", "people"),
            group_short_name=args.names.unique[:12],  # what Azure puts in a message's subject
            location="global",
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            enabled=True,
            email_receivers=[
                monitor.MicrosoftCommonEmailReceiverArgs(name=email, email_address=email, use_common_alert_schema=True)
                for email in dict.fromkeys(args.alert_emails)
            ],
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _grafana(self, args: MonitorArgs, metrics_id: pulumi.Output[str]) -> pulumi.Output[str]:
        grafana = dashboard.Grafana(
            "grafana",
            # its name is part of a host name, and short: what tells the stack apart comes first
            workspace_name=limited("dashboard", f"{args.names.unique}-grafana"),
            location=args.location,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            sku=dashboard.ResourceSkuArgs(name="Standard"),
            identity=dashboard.ManagedServiceIdentityArgs(type=dashboard.ManagedServiceIdentityType.SYSTEM_ASSIGNED),
            properties=dashboard.ManagedGrafanaPropertiesArgs(
                api_key=dashboard.ApiKey.DISABLED,
                deterministic_outbound_ip=dashboard.DeterministicOutboundIP.DISABLED,
                public_network_access=dashboard.PublicNetworkAccess.ENABLED,
                zone_redundancy=dashboard.ZoneRedundancy.DISABLED,
                grafana_integrations=dashboard.GrafanaIntegrationsArgs(
                    azure_monitor_workspace_integrations=[
                        dashboard.AzureMonitorWorkspaceIntegrationArgs(azure_monitor_workspace_resource_id=metrics_id)
                    ]
                ),
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )
        role_assignment(
            "grafana-reads-metrics",
            stack=args.names.stack,
            role="Monitoring Data Reader",
            scope=metrics_id,
            principal_id=grafana.identity.principal_id,
            subscription_id=args.subscription_id,
            parent=self,
        )
        for group in args.grafana_admin_group_ids:
            role_assignment(
                f"grafana-admin-{group}",
                stack=args.names.stack,
                role="Grafana Admin",
                scope=grafana.id,
                principal_id=group,
                subscription_id=args.subscription_id,
                parent=self,
                principal_type=authorization.PrincipalType.GROUP,
            )
        return grafana.properties.endpoint


@dataclass(frozen=True)
class ClusterMonitorArgs:
    """groups: the rules, of rule_groups; action_group_id: None lets them fire unheard

    blob_service_id, vault_id: whose reads and writes are logged too; None: not
    """

    location: str
    resource_group_name: pulumi.Input[str]
    tags: Mapping[str, str]
    names: Names
    cluster_id: pulumi.Input[str]
    workspace_id: pulumi.Input[str]
    azure_monitor_workspace_id: pulumi.Input[str]
    data_collection_endpoint_id: pulumi.Input[str]
    groups: Sequence[RuleGroup]
    action_group_id: pulumi.Input[str] | None = None
    blob_service_id: pulumi.Input[str] | None = None
    vault_id: pulumi.Input[str] | None = None


class ClusterMonitor(pulumi.ComponentResource):
    """What is collected from a cluster, and the rules on it; made after the cluster. rule_group_ids: by name."""

    rule_group_ids: dict[str, pulumi.Output[str]]

    def __init__(self, name: str, args: ClusterMonitorArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("tonnage:infra:ClusterMonitor", name, {}, opts)
        self._collect_metrics(args)
        self._collect_logs(args)
        diagnostics("cluster", args.cluster_id, CLUSTER_LOGS, args.workspace_id, parent=self, own_tables=True)
        if args.blob_service_id is not None:
            diagnostics("blobs", args.blob_service_id, BLOB_LOGS, args.workspace_id, parent=self)
        if args.vault_id is not None:
            diagnostics("vault", args.vault_id, VAULT_LOGS, args.workspace_id, parent=self, own_tables=True)
        self.rule_group_ids = {group.name: self._rules(group, args).id for group in args.groups}
        self.register_outputs({})

    def _collect_metrics(self, args: ClusterMonitorArgs) -> None:
        rule = monitor.DataCollectionRule(
            "metrics-rule",
            data_collection_rule_name=_rule_name("MSProm", args),
            location=args.location,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            kind=monitor.KnownDataCollectionRuleResourceKind.LINUX,
            description="Prometheus metrics of the cluster",
            data_collection_endpoint_id=args.data_collection_endpoint_id,
            data_sources=monitor.DataCollectionRuleDataSourcesArgs(
                prometheus_forwarder=[
                    monitor.PrometheusForwarderDataSourceArgs(name="PrometheusDataSource", streams=[METRICS_STREAM])
                ]
            ),
            destinations=monitor.DataCollectionRuleDestinationsArgs(
                monitoring_accounts=[
                    monitor.MonitoringAccountDestinationArgs(
                        name="metrics", account_resource_id=args.azure_monitor_workspace_id
                    )
                ]
            ),
            data_flows=[monitor.DataFlowArgs(streams=[METRICS_STREAM], destinations=["metrics"])],
            opts=pulumi.ResourceOptions(parent=self),
        )
        self._associate("metrics-association", _rule_name("MSProm", args), rule, args)

    def _collect_logs(self, args: ClusterMonitorArgs) -> None:
        rule = monitor.DataCollectionRule(
            "logs-rule",
            data_collection_rule_name=_rule_name("MSCI", args),
            location=args.location,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            kind=monitor.KnownDataCollectionRuleResourceKind.LINUX,
            description="Logs of the cluster's containers, its events and pods",
            data_sources=monitor.DataCollectionRuleDataSourcesArgs(
                extensions=[
                    monitor.ExtensionDataSourceArgs(
                        name="ContainerInsightsExtension",
                        extension_name="ContainerInsights",
                        streams=list(LOG_STREAMS),
                        extension_settings={
                            "dataCollectionSettings": {
                                "interval": "1m",
                                "namespaceFilteringMode": "Off",
                                "enableContainerLogV2": True,
                            }
                        },
                    )
                ]
            ),
            destinations=monitor.DataCollectionRuleDestinationsArgs(
                log_analytics=[
                    monitor.LogAnalyticsDestinationArgs(name="logs", workspace_resource_id=args.workspace_id)
                ]
            ),
            data_flows=[monitor.DataFlowArgs(streams=list(LOG_STREAMS), destinations=["logs"])],
            opts=pulumi.ResourceOptions(parent=self),
        )
        self._associate("logs-association", _rule_name("MSCI", args), rule, args)

    def _associate(
        self, name: str, association: str, rule: monitor.DataCollectionRule, args: ClusterMonitorArgs
    ) -> None:
        monitor.DataCollectionRuleAssociation(
            name,
            association_name=association,
            data_collection_rule_id=rule.id,
            resource_uri=args.cluster_id,
            description="Deleting this stops the collection from the cluster.",
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _rules(self, group: RuleGroup, args: ClusterMonitorArgs) -> alertsmanagement.PrometheusRuleGroup:
        return alertsmanagement.PrometheusRuleGroup(
            f"rules-{group.name}",
            rule_group_name=args.names.of("rule group", group.name),
            location=args.location,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            description=group.about,
            enabled=True,
            interval="PT1M",
            scopes=[args.azure_monitor_workspace_id, args.cluster_id],
            cluster_name=args.names.cluster,
            rules=[_rule(rule, args.action_group_id) for rule in group.rules],
            opts=pulumi.ResourceOptions(parent=self),
        )


def diagnostics(
    name: str,
    resource_id: pulumi.Input[str],
    categories: Sequence[str],
    workspace_id: pulumi.Input[str],
    *,
    parent: pulumi.Resource,
    own_tables: bool = False,
) -> monitor.DiagnosticSetting:
    """Sends a resource's logs of those categories to a workspace. own_tables: not all in AzureDiagnostics; for
    services that offer the choice (Blob storage always has tables of its own, and reports no choice back).
    """
    return monitor.DiagnosticSetting(
        f"{name}-logs",
        name="tonnage",
        resource_uri=resource_id,
        workspace_id=workspace_id,
        log_analytics_destination_type="Dedicated" if own_tables else None,
        logs=[monitor.DiagnosticsLogSettingsArgs(category=category, enabled=True) for category in categories],
        opts=pulumi.ResourceOptions(parent=parent),
    )


def _rule_name(prefix: str, args: ClusterMonitorArgs) -> str:
    """As the AKS baseline and the portal call rule and association, so that both are recognised there."""
    return limited("data collection rule", f"{prefix}-{args.location}-{args.names.cluster}")


def _rule(rule: Recording | Alert, action_group_id: pulumi.Input[str] | None) -> alertsmanagement.PrometheusRuleArgs:
    if isinstance(rule, Recording):
        return alertsmanagement.PrometheusRuleArgs(record=rule.name, expression=rule.expression, enabled=True)
    actions = [alertsmanagement.PrometheusRuleGroupActionArgs(action_group_id=action_group_id)]
    return alertsmanagement.PrometheusRuleArgs(
        alert=rule.name,
        expression=rule.expression,
        for_=f"PT{rule.minutes}M",
        severity=rule.severity,
        enabled=True,
        annotations={"summary": rule.summary, "description": rule.action},
        actions=actions if action_group_id is not None else [],
        resolve_configuration=alertsmanagement.PrometheusRuleResolveConfigurationArgs(
            auto_resolved=True, time_to_resolve="PT10M"
        ),
    )
