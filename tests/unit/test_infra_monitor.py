"""Monitoring and budget as they are registered: where logs and metrics go, which rules watch, who hears and when."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date
from decimal import Decimal
from typing import Any

import pulumi
import pytest
from recording import Row, fake_id, named, one, record

from infra.alerts import SCRAPED, Alert, Recording, Watch, Watched, rule_groups
from infra.budget import Budget, BudgetArgs
from infra.monitor import ClusterMonitor, ClusterMonitorArgs, Monitor, MonitorArgs
from infra.names import names
from planner.errors import PlannerError

OWNER = "00000000-0000-0000-0000-000000000001"
TAGS = {"project": "tonnage", "stack": "dev-32k"}
CLUSTER = f"/subscriptions/{OWNER}/resourceGroups/tonnage-dev-32k/providers/Microsoft.ContainerService/cluster"
STORE = f"/subscriptions/{OWNER}/resourceGroups/tonnage-dev-32k/providers/Microsoft.Storage/storageAccounts/tn1"
VAULT = f"/subscriptions/{OWNER}/resourceGroups/tonnage-dev-32k/providers/Microsoft.KeyVault/vaults/tn1"

MONITOR = MonitorArgs(
    location="swedencentral",
    resource_group_name="tonnage-dev-32k",
    tags=TAGS,
    names=names("dev-32k"),
    subscription_id=OWNER,
    daily_cap_gb=2,
    alert_emails=("ops@example.org", "finance@example.org"),
)
WATCH = Watch(
    namespace="tonnage",
    workloads=(Watched("chat", "serve"), Watched("tune", "train", gpu_memory_bytes=10**9, deadline_seconds=3600)),
    pool_minimums={"t4": 1, "a100spot": 0},
    first_token_seconds=Decimal("1.5"),
)
CLUSTER_MONITOR = ClusterMonitorArgs(
    location="swedencentral",
    resource_group_name="tonnage-dev-32k",
    tags=TAGS,
    names=names("dev-32k"),
    cluster_id=CLUSTER,
    workspace_id="/logs",
    azure_monitor_workspace_id="/metrics",
    data_collection_endpoint_id="/endpoint",
    groups=rule_groups(WATCH),
    action_group_id="/people",
    blob_service_id=f"{STORE}/blobServices/default",
    vault_id=VAULT,
)
BUDGET = BudgetArgs(
    names=names("dev-32k"),
    subscription_id=OWNER,
    amount_usd_per_month=Decimal("360.50"),
    start=date(2026, 11, 1),
    resource_groups=("tonnage-dev-32k", "tonnage-dev-32k-nodes"),
    emails=("finance@example.org",),
    action_group_id="/people",
)


def monitor_rows(**changes: Any) -> list[Row]:
    return record(lambda: Monitor("monitor", replace(MONITOR, **changes)))


def cluster_rows(**changes: Any) -> list[Row]:
    return record(lambda: ClusterMonitor("cluster-monitor", replace(CLUSTER_MONITOR, **changes)))


def budget_row(**changes: Any) -> Row:
    return one(record(lambda: Budget("budget", replace(BUDGET, **changes))), "consumption:Budget")


def alerts(watch: Watch = WATCH) -> dict[str, Alert]:
    return {rule.name: rule for group in rule_groups(watch) for rule in group.rules if isinstance(rule, Alert)}


# --- where it goes ----------------------------------------------------------------------------------------------------


def test_the_log_workspace_bills_by_the_gigabyte_keeps_thirty_days_and_stops_at_its_daily_cap() -> None:
    logs = one(monitor_rows(), "operationalinsights:Workspace").inputs
    assert logs["sku"] == {"name": "PerGB2018"}
    assert logs["retentionInDays"] == 30
    assert logs["workspaceCapping"] == {"dailyQuotaGb": 2}
    assert logs["features"] == {"disableLocalAuth": True, "enableLogAccessUsingOnlyResourcePermissions": True}


@pytest.mark.parametrize("cap", [0, Decimal("-1")])
def test_a_daily_cap_that_would_keep_no_log_is_refused(cap: Decimal) -> None:
    with pytest.raises(PlannerError, match="would keep no log at all"):
        monitor_rows(daily_cap_gb=cap)


def test_everything_that_takes_tags_has_them_and_everything_has_a_parent() -> None:
    rows = monitor_rows(grafana=True) + cluster_rows()
    # what Azure gives no tags: associations, settings, assignments; components are none of Azure's
    without = ("RuleAssociation", "DiagnosticSetting", "RoleAssignment")
    azure = [row for row in rows if row.type.startswith("azure-native:")]
    for row in azure:
        assert ("tags" in row.inputs) != row.type.endswith(without), row.type
        assert row.parent.split("::")[-1] in ("monitor", "cluster-monitor"), row.name
    assert len(azure) == 6 + 11  # logs, metrics, endpoint, people, Grafana, its role; see the tests below


def test_nothing_is_named_after_the_stack_in_pulumi() -> None:
    rows = monitor_rows(grafana=True) + cluster_rows()
    assert not [row.name for row in rows if "dev-32k" in row.name and row.type != "pulumi:pulumi:Stack"]


def test_others_learn_from_the_component_where_to_send_and_to_ask() -> None:
    def program() -> None:
        made = Monitor("monitor", replace(MONITOR, grafana=True))
        told = {
            "workspace": made.workspace_id,
            "customer": made.workspace_customer_id,
            "metrics": made.azure_monitor_workspace_id,
            "query": made.prometheus_query_endpoint,
            "endpoint": made.data_collection_endpoint_id,
            "people": made.action_group_id,
            "grafana": made.grafana_endpoint,
        }
        pulumi.CustomResource("test:index:Told", "told", told)

    rows = record(
        program,
        outputs={
            "logs": {"customerId": "11"},
            "metrics": {"metrics": {"prometheusQueryEndpoint": "https://query", "internalId": "1"}},
            "grafana": {"identity": {"principalId": "22"}, "properties": {"endpoint": "https://grafana"}},
        },
    )
    assert one(rows, "test:index:Told").inputs == {
        "workspace": fake_id("logs"),
        "customer": "11",
        "metrics": fake_id("metrics"),
        "query": "https://query",
        "endpoint": fake_id("metrics-endpoint"),
        "people": fake_id("people"),
        "grafana": "https://grafana",
    }
    assert one(rows, "RoleAssignment").inputs["principalId"] == "22"


def test_people_are_told_by_mail_once_each_in_azures_common_words() -> None:
    people = one(monitor_rows(alert_emails=("a@example.org", "b@example.org", "a@example.org")), "ActionGroup").inputs
    assert people["location"] == "global"
    assert people["groupShortName"] == "tndev32k"
    assert len(people["groupShortName"]) <= 12
    assert people["emailReceivers"] == [
        {"name": mail, "emailAddress": mail, "useCommonAlertSchema": True}
        for mail in ("a@example.org", "b@example.org")
    ]


def test_the_short_name_of_the_longest_stack_fits_in_twelve_characters() -> None:
    people = one(monitor_rows(names=names("prod-enterprise")), "ActionGroup").inputs
    assert people["groupShortName"] == "tnprodenterp"


def test_without_addresses_there_is_no_action_group() -> None:
    assert not named(monitor_rows(alert_emails=()), "ActionGroup")


def test_grafana_is_there_only_when_asked_for_and_reads_the_metrics() -> None:
    assert not named(monitor_rows(), "dashboard:Grafana")
    rows = monitor_rows(grafana=True, names=names("prod-enterprise"))
    grafana = one(rows, "dashboard:Grafana").inputs
    assert grafana["sku"] == {"name": "Standard"}
    assert grafana["identity"] == {"type": "SystemAssigned"}
    assert grafana["properties"]["apiKey"] == "Disabled"
    assert len(grafana["workspaceName"]) <= 23
    integrations = grafana["properties"]["grafanaIntegrations"]["azureMonitorWorkspaceIntegrations"]
    assert integrations == [{"azureMonitorWorkspaceResourceId": fake_id("metrics")}]
    reads = one(rows, "RoleAssignment", "grafana-reads-metrics").inputs
    assert reads["scope"] == fake_id("metrics")
    # Monitoring Data Reader
    assert reads["roleDefinitionId"].endswith("/roleDefinitions/b0d8363b-8ddd-447d-831f-62ca05bff136")


def test_the_groups_that_administer_grafana_are_groups_to_azure() -> None:
    admin = one(
        monitor_rows(grafana=True, grafana_admin_group_ids=("team",)), "RoleAssignment", "grafana-admin-team"
    ).inputs
    assert admin["principalType"] == "Group"
    assert admin["principalId"] == "team"
    assert admin["scope"] == fake_id("grafana")
    # Grafana Admin
    assert admin["roleDefinitionId"].endswith("/roleDefinitions/22926164-76b3-42b3-bc55-97df8dab3e41")


# --- what is collected ------------------------------------------------------------------------------------------------


def test_the_metrics_rule_forwards_prometheus_to_the_workspace_of_metrics() -> None:
    rows = cluster_rows()
    rule = one(rows, ":DataCollectionRule", "metrics-rule").inputs
    assert rule["kind"] == "Linux"
    assert rule["dataCollectionRuleName"] == "MSProm-swedencentral-tonnage-dev-32k"
    assert rule["dataCollectionEndpointId"] == "/endpoint"
    assert rule["dataSources"]["prometheusForwarder"][0]["streams"] == ["Microsoft-PrometheusMetrics"]
    assert rule["destinations"]["monitoringAccounts"] == [{"name": "metrics", "accountResourceId": "/metrics"}]
    assert rule["dataFlows"] == [{"streams": ["Microsoft-PrometheusMetrics"], "destinations": ["metrics"]}]


def test_the_logs_rule_takes_the_three_streams_that_are_worth_their_money() -> None:
    rule = one(cluster_rows(), ":DataCollectionRule", "logs-rule").inputs
    streams = ["Microsoft-ContainerLogV2", "Microsoft-KubeEvents", "Microsoft-KubePodInventory"]
    (source,) = rule["dataSources"]["extensions"]
    assert source["extensionName"] == "ContainerInsights"
    assert source["streams"] == streams
    assert source["extensionSettings"]["dataCollectionSettings"]["enableContainerLogV2"] is True
    assert rule["destinations"]["logAnalytics"] == [{"name": "logs", "workspaceResourceId": "/logs"}]
    assert rule["dataFlows"] == [{"streams": streams, "destinations": ["logs"]}]


@pytest.mark.parametrize(("kind", "prefix"), [("metrics", "MSProm"), ("logs", "MSCI")])
def test_each_rule_is_tied_to_the_cluster_under_the_name_that_azure_looks_for(kind: str, prefix: str) -> None:
    tie = one(cluster_rows(), "DataCollectionRuleAssociation", f"{kind}-association").inputs
    assert tie["associationName"] == f"{prefix}-swedencentral-tonnage-dev-32k"
    assert tie["resourceUri"] == CLUSTER
    assert tie["dataCollectionRuleId"] == fake_id(f"{kind}-rule")


def test_a_rule_whose_name_azure_would_refuse_is_refused_first() -> None:
    # MSProm-germanywestcentral-tonnage- is 34 characters, 64 are taken
    with pytest.raises(PlannerError, match="64"):
        cluster_rows(location="germanywestcentral", names=replace(names("dev"), cluster="tonnage-" + "a" * 31))


def test_the_control_planes_logs_are_kept_without_the_audit_of_every_read() -> None:
    setting = one(cluster_rows(), "DiagnosticSetting", "cluster-logs").inputs
    assert setting["resourceUri"] == CLUSTER
    assert setting["workspaceId"] == "/logs"
    assert setting["logAnalyticsDestinationType"] == "Dedicated"
    assert setting["logs"] == [
        {"category": category, "enabled": True}
        for category in ("kube-audit-admin", "kube-controller-manager", "cluster-autoscaler", "guard")
    ]


def test_reads_and_writes_of_blobs_and_of_the_vault_are_logged_where_they_are_given() -> None:
    rows = cluster_rows()
    blobs, vault = (one(rows, "DiagnosticSetting", f"{kind}-logs").inputs for kind in ("blobs", "vault"))
    assert blobs["resourceUri"] == f"{STORE}/blobServices/default"
    assert [log["category"] for log in blobs["logs"]] == ["StorageRead", "StorageWrite", "StorageDelete"]
    assert vault["resourceUri"] == VAULT
    assert [log["category"] for log in vault["logs"]] == ["AuditEvent"]
    bare = cluster_rows(blob_service_id=None, vault_id=None)
    assert list(named(bare, "DiagnosticSetting")) == ["cluster-logs"]


# --- the rules --------------------------------------------------------------------------------------------------------


def test_each_group_of_rules_looks_at_this_cluster_alone_every_minute() -> None:
    groups = named(cluster_rows(), "PrometheusRuleGroup")
    assert set(groups) == {"rules-gpus", "rules-serving", "rules-training", "rules-cluster"}
    for row in groups.values():
        assert row.inputs["scopes"] == ["/metrics", CLUSTER]
        assert row.inputs["clusterName"] == "tonnage-dev-32k"
        assert row.inputs["interval"] == "PT1M"
        assert row.inputs["enabled"] is True
        assert 1 <= len(row.inputs["rules"]) <= 20  # Azure's limit
    assert groups["rules-gpus"].inputs["ruleGroupName"] == "tonnage-dev-32k-gpus"


def test_an_alert_reaches_azure_with_its_severity_its_patience_and_what_to_do() -> None:
    rules = one(cluster_rows(), "PrometheusRuleGroup", "rules-cluster").inputs["rules"]
    (pending,) = [rule for rule in rules if rule["alert"] == "GpuPodPending"]
    assert pending["for"] == "PT20M"
    assert pending["severity"] == 2
    assert pending["actions"] == [{"actionGroupId": "/people"}]
    assert pending["resolveConfiguration"] == {"autoResolved": True, "timeToResolve": "PT10M"}
    assert set(pending["annotations"]) == {"summary", "description"}


def test_a_recording_reaches_azure_without_the_fields_of_an_alert() -> None:
    rules = one(cluster_rows(), "PrometheusRuleGroup", "rules-gpus").inputs["rules"]
    records = [rule for rule in rules if "record" in rule]
    assert len(records) == 3
    assert all(set(rule) == {"record", "expression", "enabled"} for rule in records)


def test_rules_fire_unheard_when_nobody_is_to_be_told() -> None:
    for row in named(cluster_rows(action_group_id=None), "PrometheusRuleGroup").values():
        for rule in row.inputs["rules"]:
            assert not rule.get("actions")


def test_every_rule_uses_only_what_an_exporter_gives_or_an_earlier_rule_recorded() -> None:
    known = {metric for metrics in SCRAPED.values() for metric in metrics}
    used: set[str] = set()
    for group in rule_groups(WATCH):
        for rule in group.rules:
            bare = re.sub(r'"[^"]*"', "", rule.expression)
            metrics = set(re.findall(r"\b(?:kube_|DCGM_|vllm:|pod:)[A-Za-z0-9_:]+", bare))
            assert metrics, rule.name
            assert metrics <= known, f"{rule.name} uses {metrics - known}"
            used |= metrics
            if isinstance(rule, Recording):
                known.add(rule.name)
    # and nothing is listed that no rule needs
    assert {metric for metrics in SCRAPED.values() for metric in metrics} <= used


def test_every_expression_is_whole() -> None:
    for group in rule_groups(WATCH):
        for rule in group.rules:
            for left, right in ("()", "{}", "[]"):
                assert rule.expression.count(left) == rule.expression.count(right), rule.name
            assert rule.expression.count('"') % 2 == 0, rule.name


def test_every_alert_says_what_happened_and_what_to_do() -> None:
    found = [rule for group in rule_groups(WATCH) for rule in group.rules if isinstance(rule, Alert)]
    assert len({alert.name for alert in found}) == len(found)
    for alert in found:
        assert 0 <= alert.severity <= 4
        assert 1 <= alert.minutes <= 30
        assert alert.summary
        assert alert.action.endswith(".")


def test_the_issue_of_the_day_has_an_alert() -> None:
    assert set(alerts()) == {
        "GpuFault",
        "GpuProgramFault",
        "GpuIdle",
        "GpuMetricsMissing",
        "GpuMemoryAboveReceipt",
        "ServerNotReady",
        "ServerMetricsMissing",
        "RequestsWaiting",
        "KvCacheAlmostFull",
        "FirstTokenLate",
        "TrainingFailed",
        "TrainingLate",
        "PoolBelowMinimum",
        "GpuPodPending",
        "NodeNotReady",
    }


def test_thresholds_are_those_that_were_asked_for() -> None:
    found = alerts(replace(WATCH, waiting_requests=7, start_minutes=45))
    assert found["GpuIdle"].expression.endswith(" < 5")
    assert found["GpuIdle"].minutes == 30
    assert found["RequestsWaiting"].expression.endswith(" > 7")
    assert found["KvCacheAlmostFull"].expression.endswith(" > 0.95")
    assert found["FirstTokenLate"].expression.endswith(" > 1.5")
    assert found["ServerNotReady"].minutes == 45
    assert found["GpuPodPending"].minutes == 20
    assert found["GpuMemoryAboveReceipt"].expression.endswith(" > 1000000000")
    assert " > 3600 " in found["TrainingLate"].expression


def test_what_is_not_promised_is_not_watched() -> None:
    bare = alerts(Watch("tonnage", (Watched("chat", "serve"), Watched("tune", "train")), {"a100spot": 0}))
    for name in ("FirstTokenLate", "GpuMemoryAboveReceipt", "TrainingLate", "PoolBelowMinimum"):
        assert name not in bare
    assert "TrainingFailed" in bare


def test_a_stack_that_only_trains_has_no_rules_for_servers() -> None:
    groups = rule_groups(Watch("tonnage", (Watched("tune", "train"),), {}))
    assert [group.name for group in groups] == ["gpus", "training", "cluster"]


@pytest.mark.parametrize("name", ["", 'x"} or vector(1) #', "Chat", "a.b", "-a"])
def test_a_name_that_is_not_kubernetess_gets_into_no_expression(name: str) -> None:
    with pytest.raises(PlannerError, match="cannot be watched"):
        rule_groups(replace(WATCH, workloads=(Watched(name, "serve"),)))


def test_two_workloads_of_one_name_are_refused() -> None:
    with pytest.raises(PlannerError, match="two workloads are called chat"):
        rule_groups(replace(WATCH, workloads=(Watched("chat", "serve"), Watched("chat", "train"))))


@pytest.mark.parametrize(
    "watch",
    [
        replace(WATCH, first_token_seconds=Decimal(0)),
        replace(WATCH, waiting_requests=0),
        replace(WATCH, workloads=(Watched("tune", "train", deadline_seconds=0),)),
        replace(WATCH, workloads=(Watched("tune", "train", gpu_memory_bytes=-1),)),
    ],
)
def test_a_limit_that_everything_exceeds_is_refused(watch: Watch) -> None:
    with pytest.raises(PlannerError, match="must be above zero"):
        rule_groups(watch)


# --- the budget -------------------------------------------------------------------------------------------------------


def test_the_budget_counts_the_two_resource_groups_of_the_stack_from_this_month_on() -> None:
    row = budget_row()
    assert row.inputs["scope"] == f"/subscriptions/{OWNER}"
    assert row.inputs["amount"] == 360.5
    assert row.inputs["category"] == "Cost"
    assert row.inputs["timeGrain"] == "Monthly"
    assert row.inputs["timePeriod"] == {"startDate": "2026-11-01T00:00:00Z"}
    assert row.inputs["filter"] == {
        "dimensions": {
            "name": "ResourceGroupName",
            "operator": "In",
            "values": ["tonnage-dev-32k", "tonnage-dev-32k-nodes"],
        }
    }
    assert row.inputs["budgetName"] == "tonnage-dev-32k-month"


def test_a_later_month_is_no_reason_to_change_the_budget() -> None:
    assert budget_row().options["ignoreChanges"] == ["timePeriod"]


def test_the_budget_speaks_at_half_at_four_fifths_when_spent_and_when_it_will_be() -> None:
    spoken = budget_row().inputs["notifications"]
    assert {
        (kind["thresholdType"], kind["threshold"], kind["operator"], kind["enabled"]) for kind in spoken.values()
    } == {
        ("Actual", 50, "GreaterThanOrEqualTo", True),
        ("Actual", 80, "GreaterThanOrEqualTo", True),
        ("Actual", 100, "GreaterThanOrEqualTo", True),
        ("Forecasted", 100, "GreaterThanOrEqualTo", True),
    }
    for kind in spoken.values():
        assert kind["contactEmails"] == ["finance@example.org"]
        assert kind["contactGroups"] == ["/people"]
        assert "contactRoles" not in kind


def test_a_budget_without_addresses_speaks_to_the_owners() -> None:
    for kind in budget_row(emails=(), action_group_id=None).inputs["notifications"].values():
        assert kind["contactEmails"] == []
        assert kind["contactRoles"] == ["Owner"]
        assert "contactGroups" not in kind


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"amount_usd_per_month": Decimal(0)}, "warns of everything"),
        ({"start": date(2026, 11, 2)}, "first day of a month"),
        ({"resource_groups": ()}, "whole subscription"),
    ],
)
def test_a_budget_that_would_not_do_its_work_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(PlannerError, match=why):
        budget_row(**change)
