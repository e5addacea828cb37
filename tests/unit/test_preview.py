"""`planner preview`: the program run in process, its tree, its costs, its policies, and what comes out of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import golden
import pytest
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from locks import ROOT, STACKS, planned, shipped

import infra
from infra.policy import SECRET, UNKNOWN, Context, Finding, Recorded
from planner import preview as previews
from planner.cli import app
from planner.errors import DoesNotFit, PlannerError
from planner.plan.lock import Lock
from planner.preview import cost as costs
from planner.preview.cost import CARRIERS, FALLBACK, FREE, bill
from planner.preview.markdown import COMMENT_MAX, preview_markdown
from planner.preview.project import PLACEHOLDER, SETTINGS, Configuration, read_project
from planner.preview.project import configuration as configured
from planner.preview.recording import Recording, record
from planner.report.preview import NO_DIFF, ShownPreview, branches
from planner.stack import read_stack

if find_spec("pulumi") is None:
    pytest.skip("pulumi is not installed: uv sync --extra infra", allow_module_level=True)

import pulumi

CANARY = "canary-0f3a9c"
POOL, CLUSTER, ACCOUNT = costs.POOL, costs.CLUSTER, costs.STORAGE
ENDPOINT = "azure-native:network:PrivateEndpoint"


def recorded(program: Callable[[], object], **more: Any) -> Recording:
    return record(program, **{"project": "tonnage", "stack": "dev-32k", "config": {}} | more)


def custom(type_: str, name: str, inputs: dict[str, Any] | None = None, **options: Any) -> pulumi.CustomResource:
    return pulumi.CustomResource(type_, name, dict(inputs or {}), pulumi.ResourceOptions(**options))


def row(type_: str, name: str, **more: Any) -> Recorded:
    return Recorded(type=type_, name=name, urn=f"urn:pulumi:s::tonnage::{type_}::{name}", **more)


class Part(pulumi.ComponentResource):
    """A component with one identity below it."""

    def __init__(self, name: str) -> None:
        super().__init__("tonnage:infra:Part", name, {}, None)
        self.child = custom("azure-native:managedidentity:UserAssignedIdentity", "kubelet", parent=self)
        self.register_outputs({})


# ------------------------------------------------------------------------------------------------- the recording


def test_resources_come_in_the_order_of_the_program_although_requests_do_not() -> None:
    def program() -> None:
        first = custom("azure-native:network:VirtualNetwork", "net")
        # waits for the network, while the next one waits for nothing
        custom("azure-native:network:Subnet", "nodes", {"virtualNetworkName": first.id.apply(str)})
        Part("identities")
        custom("azure-native:storage:StorageAccount", "models")

    assert [r.name for r in recorded(program).resources] == ["net", "nodes", "identities", "kubelet", "models"]


def test_urns_are_those_of_the_engine() -> None:
    # the engine leaves the stack out of the types and puts every component in
    rows = {r.name: r for r in recorded(lambda: Part("identities")).resources}
    part = "urn:pulumi:dev-32k::tonnage::tonnage:infra:Part::identities"
    child = "tonnage:infra:Part$azure-native:managedidentity:UserAssignedIdentity"
    assert rows["identities"].urn == part
    assert rows["identities"].parent == ""
    assert rows["kubelet"].urn == f"urn:pulumi:dev-32k::tonnage::{child}::kubelet"
    assert rows["kubelet"].parent == part


def test_inputs_are_plain_data_with_whole_numbers_and_without_nulls() -> None:
    given = {"count": 3, "share": 0.5, "on": True, "zones": ["1", {"n": 2}], "none": None, "empty": ""}
    (found,) = recorded(lambda: custom("azure-native:x:Y", "y", given)).resources
    assert found.inputs == {"count": 3, "share": 0.5, "on": True, "zones": ["1", {"n": 2}], "empty": ""}
    assert type(found.inputs["count"]) is int
    assert list(found.inputs) == sorted(found.inputs)


def test_files_are_recorded_as_where_they_are() -> None:
    (found,) = recorded(lambda: custom("azure-native:x:Y", "y", {"code": pulumi.FileArchive("./images")})).resources
    assert found.inputs == {"code": {"path": "./images"}}


def test_what_azure_computes_stays_unknown_and_ids_are_placeholders() -> None:
    from pulumi_azure_native import managedidentity, storage

    def program() -> None:
        account = storage.StorageAccount(
            "models", resource_group_name="g", kind="StorageV2", sku=storage.SkuArgs(name="Standard_LRS")
        )
        identity = managedidentity.UserAssignedIdentity("kubelet", resource_group_name="g", resource_name_="who")
        endpoint = account.primary_endpoints.apply(lambda e: e.blob)
        pulumi.export("endpoint", endpoint)
        pulumi.export("account", account.name)
        pulumi.export("identity", identity.name)
        pulumi.export("client", identity.client_id)
        pulumi.export("id", account.id)

    assert recorded(program).outputs == {
        "endpoint": UNKNOWN,
        "account": "<name of models>",  # Pulumi makes it up
        "identity": "who",
        "client": "<client of kubelet>",
        "id": "/subscriptions/<subscription>/storage/StorageAccount/models",
    }


def test_a_name_is_the_resources_own_and_never_that_of_its_parent() -> None:
    from pulumi_azure_native import containerservice, network

    def program() -> None:
        pool = containerservice.AgentPool("a", resource_group_name="g", resource_name_="cluster", agent_pool_name="t4")
        nameless = containerservice.AgentPool("b", resource_group_name="g", resource_name_="cluster")
        subnet = network.Subnet("c", resource_group_name="g", virtual_network_name="net")
        pulumi.export("pool", pool.name)
        pulumi.export("nameless", nameless.name)
        pulumi.export("subnet", subnet.name)

    outputs = recorded(program).outputs
    assert outputs["pool"] == "t4"
    assert outputs["subnet"] == "<name of c>"


def test_kubernetes_objects_keep_what_they_are_given() -> None:
    def program() -> None:
        space = custom("kubernetes:core/v1:Namespace", "space", {"metadata": {"name": "tonnage"}})
        job = {"metadata": {"name": "train", "namespace": "tonnage"}}
        pulumi.export("space", space.id)
        pulumi.export("job", custom("kubernetes:batch/v1:Job", "job", job).id)

    assert recorded(program).outputs == {"space": "tonnage", "job": "tonnage/train"}


def test_secrets_are_kept_by_their_place_alone() -> None:
    def program() -> None:
        secret = pulumi.Output.secret(CANARY)
        custom("azure-native:keyvault:Secret", "key", {"properties": {"value": secret}, "list": [secret]})
        pulumi.export("key", secret)

    done = recorded(program)
    assert done.resources[0].inputs == {"properties": SECRET, "list": SECRET} or done.resources[0].inputs == {
        "properties": {"value": SECRET},
        "list": [SECRET],
    }
    assert done.outputs == {"key": SECRET}
    assert CANARY not in repr(done)


def test_options_are_recorded() -> None:
    def program() -> None:
        custom(
            "azure-native:containerservice:AgentPool",
            "t4",
            protect=True,
            retain_on_delete=True,
            ignore_changes=["count"],
            delete_before_replace=True,
            custom_timeouts=pulumi.CustomTimeouts(create="45m", delete="30m"),
            depends_on=[custom("azure-native:network:Subnet", "nodes")],
        )

    pool = next(r for r in recorded(program).resources if r.name == "t4")
    assert (pool.protect, pool.retain_on_delete, pool.delete_before_replace) == (True, True, True)
    assert pool.ignore_changes == ("count",)
    assert pool.timeouts == {"create": "45m", "delete": "30m"}
    assert pool.dependencies == ("urn:pulumi:dev-32k::tonnage::azure-native:network:Subnet::nodes",)


def test_azures_answers_are_placeholders_or_unknown_and_a_note_says_so() -> None:
    from pulumi_azure_native import authorization, containerservice, network

    def program() -> None:
        credentials = containerservice.list_managed_cluster_user_credentials_output(
            resource_group_name="g", resource_name="cluster", format="exec"
        )
        pulumi.export("who", authorization.get_client_config().subscription_id)
        pulumi.export("cluster", credentials.kubeconfigs[0].name)
        network_found = network.get_virtual_network_output(resource_group_name="g", virtual_network_name="n")
        pulumi.export("network", network_found.location)

    done = recorded(program)
    assert done.outputs == {"who": "<subscription>", "cluster": "cluster", "network": UNKNOWN}
    assert done.notes == ("what azure-native:network:getVirtualNetwork answers is not known without asking Azure",)


def test_warnings_become_notes_and_prints_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    def program() -> None:
        print("said by the program")
        pulumi.log.warn("the pool\nis large")
        pulumi.log.info("all is well")

    assert recorded(program).notes == ("the pool is large",)
    assert capsys.readouterr() == ("", "said by the program\n")


def test_runs_leave_nothing_behind_for_the_next() -> None:
    def program() -> None:
        pulumi.export("stack", pulumi.get_stack())
        pulumi.export("value", pulumi.Config("tonnage").get("value") or "none")
        custom("azure-native:resources:ResourceGroup", "group")

    first = recorded(program, stack="one", config={"tonnage:value": "1"})
    second = recorded(program, stack="two")
    again = recorded(program, stack="one", config={"tonnage:value": "1"})
    assert first.outputs == {"stack": "one", "value": "1"}
    assert second.outputs == {"stack": "two", "value": "none"}
    assert again == first
    assert pulumi.runtime.get_root_resource() is None


def refuse() -> None:
    raise DoesNotFit("too dear")


def refuse_in_apply() -> None:
    group = custom("azure-native:resources:ResourceGroup", "group")
    bad = group.id.apply(lambda _: refuse())
    custom("azure-native:storage:StorageAccount", "models", {"x": bad})


def refuse_as_pulumi_does() -> None:
    try:
        refuse()
    except PlannerError as error:
        raise pulumi.RunError(str(error)) from error


@pytest.mark.parametrize("program", [refuse, refuse_in_apply, refuse_as_pulumi_does])
def test_a_refusal_of_the_program_comes_out_with_its_exit_code(program: Callable[[], None]) -> None:
    with pytest.raises(DoesNotFit, match=r"^too dear$"):
        recorded(program)


def test_a_missing_value_is_refused_in_one_line() -> None:
    with pytest.raises(PlannerError, match=r"^the Pulumi program refuses: .*'tonnage:apiKey'.*config set") as caught:
        recorded(lambda: pulumi.Config("tonnage").require_secret("apiKey"))
    assert "\n" not in str(caught.value)


def test_two_resources_of_one_name_are_refused_as_the_engine_does() -> None:
    def program() -> None:
        custom("azure-native:resources:ResourceGroup", "group")
        custom("azure-native:resources:ResourceGroup", "group")

    with pytest.raises(PlannerError, match="two resources group of type azure-native:resources:ResourceGroup"):
        recorded(program)


def test_a_mistake_in_the_program_is_shown_as_python_shows_it() -> None:
    with pytest.raises(ZeroDivisionError):
        recorded(lambda: 1 // 0)


@pytest.mark.parametrize("package", ["pulumi", "pulumi_azure_native"])
def test_a_missing_package_is_one_sentence(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == package]:
        monkeypatch.setitem(sys.modules, name, None)

    def program() -> None:
        import pulumi_azure_native  # noqa: F401

    with pytest.raises(PlannerError, match=f"needs {package}, which is not installed: uv sync --extra infra"):
        recorded(program)


def test_every_setting_that_pulumi_keeps_in_its_context_is_set() -> None:
    # names that are half private: this fails when a new Pulumi has one more
    from pulumi.runtime import mocks, settings

    kept = {name for name, value in vars(settings.Settings).items() if type(value).__name__ == "ContextProperty"}
    seen: set[str] = set()

    def program() -> None:
        seen.update(name for name in kept if _is_set(settings.SETTINGS, name))

    recorded(program)
    assert len(kept) > 10
    assert seen == kept
    assert issubclass(mocks.MockSettings, settings.Settings)


def _is_set(settings: Any, name: str) -> bool:
    try:
        getattr(settings, name)
    except (AttributeError, LookupError):
        return False
    return True


# ------------------------------------------------------------------------------------------------------ the project

INTENT, LOCK = shipped("dev-32k")
PROGRAM = """
    import pulumi
    from planner.plan import parse_intent
    from planner.plan.lock import check_lock, parse_lock

    config = pulumi.Config("tonnage")
    intent = parse_intent(config.require_object("intent"), "intent")
    lock = parse_lock(config.require_object("plan"), "plan")
    check_lock(lock, intent, "plan")
    key = config.require_secret("apiKey")
    print("hello from the program")

    def make(type_, name, inputs=None, **options):
        return pulumi.CustomResource(type_, name, dict(inputs or {}), pulumi.ResourceOptions(**options))

    class Part(pulumi.ComponentResource):
        def __init__(self, name):
            super().__init__("tonnage:infra:Part", name, {}, None)

    make("azure-native:resources:ResourceGroup", "group")
    part = Part("cluster")
    cluster = make("azure-native:containerservice:ManagedCluster", "cluster", parent=part)
    for pool in lock.pools:
        inputs = {"agentPoolName": pool.name, "vmSize": pool.sku}
        make("azure-native:containerservice:AgentPool", pool.name, inputs, parent=part)
    make("azure-native:storage:StorageAccount", "models", protect=True, retain_on_delete=True)
    make("azure-native:redis:Redis", "cache [x] | <b>")
    vault = make("azure-native:keyvault:Vault", "vault")
    make("azure-native:keyvault:Secret", "api-key", {"properties": {"value": key}}, parent=vault)
    for name in ("serve", "train"):
        make("kubernetes:core/v1:ServiceAccount", f"serviceaccount-{name}", {"metadata": {"name": name}}, parent=part)
    make("kubernetes:core/v1:Secret", "plain", {"stringData": {"token": "CANARY"}}, parent=part)
    pulumi.export("cluster", cluster.id)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own with a small program, and the working folder."""
    (tmp_path / "infra").mkdir()
    (tmp_path / "stacks").mkdir()
    about = {"name": "tonnage", "runtime": {"name": "python"}, "main": "infra/", "stackConfigDir": "stacks"}
    (tmp_path / "Pulumi.yaml").write_text(yaml.safe_dump(about))
    write_program(tmp_path, PROGRAM.replace("CANARY", CANARY))
    write_stack(tmp_path, intent_of("dev-32k"), LOCK)
    monkeypatch.chdir(tmp_path)
    # what is imported already counts as this project's own
    monkeypatch.setattr(infra, "__file__", str(tmp_path / "infra" / "__init__.py"))
    return tmp_path


def configuration(stack: str) -> Configuration:
    return configured(read_project(), read_stack(stack))


def write_program(project: Path, source: str) -> None:
    (project / "infra" / "__main__.py").write_text(textwrap.dedent(source))


def write_stack(project: Path, intent: object, lock: Lock, **more: Any) -> None:
    config = {"tonnage:intent": intent, "tonnage:plan": lock.plain(), **more}
    (project / "stacks" / "Pulumi.dev-32k.yaml").write_text(yaml.safe_dump({"config": config}, sort_keys=False))


def intent_of(stack: str) -> Any:
    content = yaml.safe_load((ROOT / "stacks" / f"Pulumi.{stack}.yaml").read_text(encoding="utf-8"))
    return content["config"]["tonnage:intent"]


def test_the_defaults_of_the_project_lie_under_the_stacks_values(project: Path) -> None:
    with (project / "Pulumi.yaml").open("a") as file:
        file.write(
            "config:\n"
            "  azure-native:location: {value: swedencentral}\n"
            "  pulumi:autonaming: {value: {mode: verbatim}}\n"
            "  size: {type: integer, default: 3}\n"
            "  kubelogin: {type: string, default: azurecli}\n"
            "  note: {type: string}\n"
            "  plain: yes indeed\n"
        )
    (project / "stacks" / "Pulumi.x.yaml").write_text(
        "config:\n  tonnage:kubelogin: spn\n  tonnage:on: true\n  tonnage:deep: {a: [1, 2.5]}\n"
    )
    found = configuration("x")
    assert found.values == {
        "azure-native:location": "swedencentral",
        "pulumi:autonaming": '{"mode": "verbatim"}',
        "tonnage:size": "3",
        "tonnage:kubelogin": "spn",
        "tonnage:plain": "yes indeed",
        "tonnage:on": "true",
        "tonnage:deep": '{"a": [1, 2.5]}',
    }
    assert found.secret_keys == ()


def test_encrypted_values_become_placeholders_and_their_keys_secret(project: Path) -> None:
    (project / "stacks" / "Pulumi.x.yaml").write_text(
        "encryptionsalt: v1:abc\n"
        f"config:\n  tonnage:apiKey: {{secure: {CANARY}}}\n"
        f"  tonnage:deep: {{open: 1, list: [{{secure: {CANARY}}}]}}\n"
        "  tonnage:open: {insecure: 1}\n"
    )
    found = configuration("x")
    assert found.values["tonnage:apiKey"] == PLACEHOLDER
    assert json.loads(found.values["tonnage:deep"]) == {"open": 1, "list": [PLACEHOLDER]}
    assert found.secret_keys == ("tonnage:apiKey", "tonnage:deep")


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ("name: [", "cannot be read as YAML"),
        ("runtime: python", "names no project"),
        ("name: t\nruntime: python\nmain: infra/", "write stackConfigDir: stacks"),
        ("name: t\nruntime: go\nstackConfigDir: stacks", "the runtime go"),
        ("name: t\nruntime: python\nstackConfigDir: stacks\nmain: nowhere", "there is no program"),
    ],
)
def test_a_project_that_cannot_be_previewed_is_refused(project: Path, about: str, says: str) -> None:
    (project / "Pulumi.yaml").write_text(about)
    with pytest.raises(PlannerError, match=says):
        read_project()


def test_a_date_without_quotes_is_refused(project: Path) -> None:
    (project / "stacks" / "Pulumi.x.yaml").write_text("config:\n  tonnage:day: 2026-11-22\n")
    with pytest.raises(PlannerError, match="tonnage:day holds what JSON cannot"):
        configuration("x")


# ------------------------------------------------------------------------------------------------------------- cost


def costs_of(rows: list[Recorded], lock: Lock) -> dict[str, Any]:
    made = bill(rows, lock)
    return {r.name: cost for r, cost in zip(rows, made.costs, strict=True)} | {"elsewhere": made.elsewhere}


def lines(lock: Lock, **usd: str | None) -> Lock:
    """The lock with these lines alone."""
    amounts = {key: None if value is None else Decimal(value) for key, value in usd.items()}
    total = sum((value for value in amounts.values() if value is not None), Decimal(0))
    return lock.model_copy(update={"lines_usd": amounts, "usd": total})


def test_each_line_lies_on_the_resource_that_azure_bills_it_for() -> None:
    lock = lines(LOCK, **{"platform/system-nodes": "280.32", "platform/registry": "5.07", "storage/weights": "0.30"})
    rows = [row(CLUSTER, "cluster"), row("azure-native:containerregistry:Registry", "images"), row(ACCOUNT, "models")]
    found = costs_of(rows, lock)
    assert found["cluster"].usd == Decimal("280.32")
    assert found["images"].usd == Decimal("5.07")
    assert found["models"].usd == Decimal("0.30")
    assert found["elsewhere"] == {}


def test_endpoints_share_their_line_in_whole_cents() -> None:
    # 21.92 / 3 = 7.3066...: two cents are left over, and the first two endpoints take one each
    lock = lines(LOCK, **{"network/private-endpoints": "21.92"})
    found = bill([row(ENDPOINT, name) for name in ("blob", "vault", "registry")], lock)
    assert [cost.usd for cost in found.costs] == [Decimal("7.31"), Decimal("7.31"), Decimal("7.30")]


def test_a_pool_carries_the_lines_of_its_workloads_and_a_fallback_none() -> None:
    (pool,) = LOCK.pools
    twin = pool.model_copy(update={"name": "a100", "priority": "on-demand", "fallback": True})
    lock = lines(LOCK, **{"gpu/finetune": "84.00", "gpu/serve": "41.07"}).model_copy(update={"pools": (pool, twin)})
    rows = [row(POOL, "spot", inputs={"agentPoolName": pool.name}), row(POOL, "twin", inputs={"agentPoolName": "a100"})]
    found = costs_of(rows, lock)
    assert found["spot"].usd == Decimal("125.07")
    assert found["twin"].usd == 0
    assert found["twin"].why == FALLBACK


def test_a_pool_that_the_plan_does_not_know_is_unpriced() -> None:
    found = bill([row(POOL, "mine", inputs={"agentPoolName": "mine"})], LOCK)
    assert found.costs[0].usd is None
    assert f"mine ({POOL})" in found.unpriced


def test_a_line_without_a_price_is_named_and_counts_for_nothing() -> None:
    lock = lines(LOCK, **{"platform/system-nodes": "280.32", "security/defender": None, "people/x": None})
    found = bill([row(CLUSTER, "cluster")], lock)
    assert found.costs[0].usd == Decimal("280.32")
    assert found.costs[0].unpriced == ("security/defender",)
    assert found.unpriced == ("security/defender", "people/x")
    assert found.usd == Decimal("280.32")


def test_a_resource_with_no_price_at_all_is_unpriced_and_not_0() -> None:
    found = bill([row(CLUSTER, "cluster")], lines(LOCK, **{"security/defender": None}))
    assert found.costs[0].usd is None


@pytest.mark.parametrize(
    ("type_", "inputs", "free"),
    [
        ("azure-native:resources:ResourceGroup", {}, True),
        ("azure-native:network/v20240101:VirtualNetwork", {}, True),  # a token with a version
        ("azure-native:redis:Redis", {}, False),
        ("azure-native:network:NatGateway", {}, False),
        ("tonnage:infra:Cluster", {}, True),
        ("pulumi:providers:kubernetes", {}, True),
        ("kubernetes:apps/v1:Deployment", {"spec": {}}, True),
        ("kubernetes:core/v1:PersistentVolumeClaim", {"spec": {}}, False),  # the default class makes disks
        ("kubernetes:core/v1:PersistentVolumeClaim", {"spec": {"storageClassName": "managed-csi"}}, False),
        ("kubernetes:core/v1:PersistentVolumeClaim", {"spec": {"storageClassName": ""}}, True),
        ("kubernetes:core/v1:PersistentVolumeClaim", {"spec": {"storageClassName": "azureblob-fuse-premium"}}, True),
        ("kubernetes:apps/v1:StatefulSet", {"spec": {"volumeClaimTemplates": [{"spec": {}}]}}, False),
        ("kubernetes:apps/v1:StatefulSet", {"spec": {}}, True),
    ],
)
def test_what_costs_nothing_by_itself_is_told_from_what_has_no_price(type_: str, inputs: Any, free: bool) -> None:
    (found,) = bill([row(type_, "x", inputs=inputs)], LOCK).costs
    assert found.free is free
    assert found.usd == (Decimal(0) if free else None)
    assert found.why


@given(
    stack=st.sampled_from(STACKS),
    kinds=st.lists(st.sampled_from([*sorted({k for _, kinds in CARRIERS for k in kinds}), POOL, "azure-native:x:Y"])),
)
def test_whatever_the_program_makes_the_sum_is_that_of_the_plan(stack: str, kinds: list[str]) -> None:
    _, lock = shipped(stack)
    pools = [pool.name for pool in lock.pools]
    rows = [row(kind, f"r{n}", inputs={"agentPoolName": pools[n % len(pools)]}) for n, kind in enumerate(kinds)]
    found = bill(rows, lock)
    assert found.usd == lock.usd
    carried = {key for cost in found.costs for key in cost.lines} | set(found.elsewhere)
    assert carried == set(lock.lines_usd)
    unpriced = {key for key, usd in lock.lines_usd.items() if usd is None}
    assert unpriced <= set(found.unpriced)


def test_every_type_in_the_tables_is_one_of_azure_native() -> None:
    site = Path(str(find_spec("pulumi_azure_native") and find_spec("pulumi_azure_native").origin)).parent  # type: ignore[union-attr]
    tokens = {f"azure-native:{kind}" for kind in FREE} | {kind for _, kinds in CARRIERS for kind in kinds} | {POOL}
    for token in sorted(tokens):
        _, module, kind = token.split(":")
        file = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", kind).lower()
        assert f"'{token}'" in (site / module / f"{file}.py").read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------- the whole command


@pytest.fixture
def no_policy(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """Policy findings that a test writes, in place of those for a small program."""
    found: list[Finding] = []

    def judged(resources: tuple[Recorded, ...], context: Context) -> tuple[Finding, ...]:
        assert context.stack == "dev-32k"
        assert len(resources) > 1
        return tuple(found)

    monkeypatch.setattr("infra.policy.check", judged)
    return found


def finding(**more: Any) -> Finding:
    given = {"rule": "vault-open", "resource": "vault", "urn": "u", "sentence": "vault is open", "severity": "high"}
    return Finding(**given | more)


COMMAND = ("preview", "--stack", "dev-32k")


def refused(*argv: str, code: int = 2) -> str:
    outcome = golden.run(argv)
    assert outcome.exit_code == code, outcome
    last: str = outcome.stderr.splitlines()[-1]
    assert "Traceback" not in outcome.stderr
    assert last.startswith("planner: ")
    return last


@pytest.mark.parametrize("columns", [80, 160])
def test_the_terminal_shows_amount_tree_policy_quota_and_the_next_step(
    project: Path, no_policy: list[Finding], columns: int
) -> None:
    no_policy.extend((finding(excused="no one else is in it yet", rule="x"), finding(severity="low", rule="y")))
    outcome = golden.run(COMMAND, columns)
    assert outcome.exit_code == 0
    assert outcome.stderr == "hello from the program\n"
    said = outcome.stdout.splitlines()
    assert all(len(line) <= columns for line in said if "pulumi config set" not in line)
    # 1 group, 1 component, 1 cluster, 1 pool, account, cache, vault, its secret, 2 accounts and 1 Secret of Kubernetes
    assert re.match(r"dev-32k in eastus: 11 resources, at least \$[0-9.]+ a month of\b", said[0])
    assert f"${LOCK.usd} a month" in said[0]
    assert NO_DIFF in said
    text = "\n".join(line.rstrip() for line in said)
    short, long = "ManagedCluster", "azure-native:containerservice:ManagedCluster"
    assert (long in text) is (columns == 160)
    assert short in text
    assert re.search(r"^ ├─ serve, train +(kubernetes:core/v1:)?ServiceAccount +-$", text, flags=re.M)
    assert re.search(r"^ models \(protected, retained\) +\S+ +[0-9.]+$", text, flags=re.M)
    assert re.search(r"^ └─ api-key +\S+ +-$", text, flags=re.M)
    assert re.search(r"^ cache \[x\] \| <b> +\S+ +unpriced$", text, flags=re.M)
    assert re.search(r"^ people/developer-machines +planned, not created here +76\.80$", text, flags=re.M)
    assert "cache [x] | <b> (azure-native:redis:Redis)" in " ".join(text.split())
    assert "Policy: 1 finding, 1 excused with a reason" in text
    assert text.index(" y ") < text.index("no one else is in it yet")
    assert "Total Regional vCPUs" in text
    assert said[-1] == "      pulumi up --stack dev-32k"
    # amounts end where the column ends
    tree = text[text.index("Resources") : text.index("Unpriced:")].rstrip().splitlines()[3:]
    assert len({len(line) for line in tree}) == 1


def test_json_is_nothing_but_the_preview(project: Path, no_policy: list[Finding]) -> None:
    outcome = golden.run((*COMMAND, "--json"))
    made = json.loads(outcome.stdout)
    assert made["schema_version"] == "tonnage.preview/1"
    assert made["is_diff"] is False
    assert made["usd_per_month"] == str(LOCK.usd)
    assert made["quota"] == LOCK.quota
    rows = {r["name"]: r for r in made["resources"]}
    assert rows["cache [x] | <b>"]["usd_per_month"] is None
    assert rows["api-key"]["inputs"] == {"properties": {"value": SECRET}}
    assert rows["models"]["protect"] is True
    total = sum(Decimal(r["usd_per_month"] or 0) for r in rows.values())
    assert total + sum(Decimal(usd or 0) for usd in made["elsewhere"].values()) == LOCK.usd
    assert ShownPreview.model_validate(made).stack == "dev-32k"


@pytest.mark.parametrize("form", [(), ("--json",), ("--format", "md")])
def test_no_secret_is_printed_in_any_form(project: Path, no_policy: list[Finding], form: tuple[str, ...]) -> None:
    encrypted = {"tonnage:apiKey": {"secure": f"v1:{CANARY}"}}
    write_stack(project, intent_of("dev-32k"), LOCK, **encrypted)
    outcome = golden.run((*COMMAND, *form))
    assert outcome.exit_code == 0
    assert CANARY not in outcome.stdout + outcome.stderr
    assert PLACEHOLDER not in outcome.stdout + outcome.stderr
    assert "is not set yet" not in outcome.stdout


def test_a_secret_that_is_not_set_yet_is_a_note_with_its_command(project: Path, no_policy: list[Finding]) -> None:
    said = " ".join(golden.run(COMMAND).stdout.split())
    assert "Note: the secret tonnage:apiKey is not set yet: `pulumi config set --secret tonnage:apiKey" in said
    assert said.endswith(
        'Next: pulumi config set --secret tonnage:apiKey "$(openssl rand -hex 32)" --stack dev-32k'
        " pulumi up --stack dev-32k"
    )
    made = json.loads(golden.run((*COMMAND, "--json")).stdout)
    assert list(made["unset"]) == ["tonnage:apiKey"]


def test_commands_stand_on_lines_of_their_own_that_are_never_broken(project: Path, no_policy: list[Finding]) -> None:
    lines = golden.run(COMMAND, 80).stdout.splitlines()
    command = 'pulumi config set --secret tonnage:apiKey "$(openssl rand -hex 32)" --stack dev-32k'
    assert f"  `{command}`" in lines
    assert f"Next: {command}" in lines
    assert "  `az vm list-usage --location eastus -o table`" in lines


def test_notes_of_the_policy_are_not_counted_as_findings(project: Path, no_policy: list[Finding]) -> None:
    no_policy.extend((finding(severity="note"), finding(severity="low"), finding(severity="medium")))
    assert "Policy: 2 findings, 1 note." in golden.run(COMMAND).stdout


def test_a_setting_that_the_program_does_not_know_is_refused(project: Path, no_policy: list[Finding]) -> None:
    write_stack(project, intent_of("dev-32k"), LOCK, **{"tonnage:kubeLogin": "spn"})
    assert "tonnage:kubeLogin is no setting of the program: did you mean tonnage:kubelogin?" in refused(*COMMAND)
    write_stack(project, intent_of("dev-32k"), LOCK, **{"tonnage:colour": "red"})
    assert "tonnage:colour is no setting of the program: take it out" in refused(*COMMAND)


def test_the_settings_that_are_taken_are_those_that_the_program_reads() -> None:
    from infra.settings import SECRETS

    source = (ROOT / "infra" / "__main__.py").read_text(encoding="utf-8")
    assert set(re.findall(r'config\.get\w*\("(\w+)"\)', source)) | set(SECRETS) == set(SETTINGS)


def test_a_quota_says_what_it_is_for(project: Path, no_policy: list[Finding]) -> None:
    made = json.loads(golden.run((*COMMAND, "--json")).stdout)["quota_for"]
    # one pool, on spot; people's machines are of the system nodes' family
    assert made == {
        "standardDSv5Family": "system nodes, and one more while they are upgraded; developers' machines",
        "Total Regional Spot vCPUs": "pool a100spot, full",
        "Total Regional vCPUs": "all machines but spot",
    }


def test_without_pulumi_the_command_says_what_to_install(project: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('pulumi', 'pulumi_azure_native', 'pulumi_kubernetes'): sys.modules[name] = None\n"
        "from planner.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, *COMMAND]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "planner: a preview needs pulumi, which is not installed: uv sync --extra infra\n"


def test_a_file_that_the_program_misses_is_not_mistaken_for_stdout(project: Path, no_policy: list[Finding]) -> None:
    write_program(project, "open('missing.yaml')\n")
    assert "the Pulumi program cannot read missing.yaml (No such file or directory): restore it" in refused(*COMMAND)


def test_the_program_of_another_clone_is_refused(
    project: Path, no_policy: list[Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infra, "__file__", str(ROOT / "infra" / "__init__.py"))
    assert f"the program is that of {ROOT} and not of this folder: run planner in a whole clone" in refused(*COMMAND)


def test_the_packages_of_the_folder_go_before_those_that_are_installed(tmp_path: Path) -> None:
    for clone in ("mine", "other"):
        (tmp_path / clone / "infra").mkdir(parents=True)
        (tmp_path / clone / "infra" / "__init__.py").write_text("")
    script = (
        "import sys\nfrom pathlib import Path\nfrom planner.preview import _importable\n"
        "sys.path.insert(0, 'other')\n"
        "with _importable(Path('mine')):\n    import infra\n    print(infra.__file__)\n"
        "print(sys.path[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [str(tmp_path / "mine" / "infra" / "__init__.py"), "other"]


def test_the_comment_says_what_costs_and_hides_the_rest(project: Path, no_policy: list[Finding]) -> None:
    no_policy.append(finding(severity="medium", sentence="reaches <everyone> | see *rule*"))
    text = golden.run((*COMMAND, "--format", "md")).stdout
    assert text.startswith("<!-- tonnage-preview dev-32k -->\n")
    assert "<everyone>" not in text
    assert "<b>" not in text.replace("cache [x] | <b>  Redis", "")  # in the block of text it is text
    assert r"| cache \[x\] \| &lt;b> | Redis | unpriced |" in text
    assert "| people/developer-machines | planned, not created here | 76.80 |" in text
    assert f"| **total** |  | **{LOCK.usd} + ?** |" in text
    assert text.count("<details>") == text.count("</details>") == 3  # resources, quota, notes
    assert NO_DIFF in text
    assert "- **medium** `vault-open` (`vault`): reaches &lt;everyone>" in text


def test_a_comment_too_long_for_github_leaves_the_tree_out(project: Path, no_policy: list[Finding]) -> None:
    made = previews.shown(previews.preview("dev-32k"))
    free = next(r for r in made.resources if r.name == "group")
    many = tuple(free.model_copy(update={"name": f"{n:030}", "urn": f"u{n}"}) for n in range(2000))
    text = preview_markdown(made.model_copy(update={"resources": made.resources + many}))
    assert len(text) < COMMENT_MAX
    assert "2011 resources are more than a comment can hold" in text


def test_a_grave_finding_without_a_reason_ends_with_1(project: Path, no_policy: list[Finding]) -> None:
    no_policy.append(finding())
    outcome = golden.run(COMMAND)
    assert outcome.exit_code == 1
    assert "Next: change what the findings name" in outcome.stdout
    assert outcome.stderr.splitlines()[-1].startswith("planner: policy vault-open: vault is open; change it")


def test_grave_findings_with_a_reason_and_light_ones_without_do_not_stop(
    project: Path, no_policy: list[Finding]
) -> None:
    no_policy.extend((finding(excused="it is a lab"), finding(severity="medium"), finding(severity="note")))
    assert golden.run(COMMAND).exit_code == 0


def test_a_plan_over_budget_ends_with_1(project: Path, no_policy: list[Finding]) -> None:
    wanted = intent_of("dev-32k") | {"approved_usd_per_month": 100}
    _, lock = planned(wanted)
    write_stack(project, wanted, lock)
    assert "and $100.00 is approved" in refused(*COMMAND, code=1)


def test_a_plan_for_another_intent_is_refused(project: Path, no_policy: list[Finding]) -> None:
    write_stack(project, intent_of("dev-32k") | {"approved_usd_per_month": 701}, LOCK)
    said = refused(*COMMAND)
    assert "answers another intent than the one beside it: run `planner plan --stack dev-32k` and commit" in said


def test_bad_input_is_one_sentence(
    project: Path, no_policy: list[Finding], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no stack file" in refused("preview", "--stack", "nope")
    assert "give one of them" in refused(*COMMAND, "--json", "--format", "md")
    write_program(project, "import pulumi\npulumi.Config('tonnage').require('missing')\n")
    assert "Missing required configuration variable 'tonnage:missing'" in refused(*COMMAND)
    write_program(project, "import infra.nothing_here\n")
    assert "infra.nothing_here is missing" in refused(*COMMAND)
    write_stack(project, intent_of("dev-32k"), LOCK.model_copy(update={"region": "westeurope"}))
    assert "was edited by hand" in refused(*COMMAND)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert "there is no Pulumi.yaml here" in refused(*COMMAND)


def test_the_result_can_be_walked_as_a_tree(project: Path, no_policy: list[Finding]) -> None:
    made = previews.preview(" dev-32k ")
    top = [r.name for r in made.children()]
    assert top == ["group", "cluster", "models", "cache [x] | <b>", "vault"]
    part = made.children()[1]
    assert [r.name for r in made.children(part.urn)] == [
        "cluster",
        "a100spot",
        "serviceaccount-serve",
        "serviceaccount-train",
        "plain",
    ]
    assert made.quota == LOCK.quota
    assert made.outputs == {"cluster": "/subscriptions/<subscription>/containerservice/ManagedCluster/cluster"}


# ------------------------------------------------------------------------------------------ the stacks that are shipped


@cache
def real(stack: str) -> previews.Preview:
    """The preview of a shipped stack by the program that `pulumi up` runs."""
    with contextlib.chdir(ROOT):
        return previews.preview(stack)


each_stack = pytest.mark.parametrize("stack", STACKS)


@each_stack
def test_the_costs_of_a_shipped_stack_add_up_to_its_plan(stack: str) -> None:
    made = real(stack)
    assert made.bill.usd == made.lock.usd
    assert made.lock.approved_usd_per_month is not None
    assert made.bill.usd <= made.lock.approved_usd_per_month


@each_stack
def test_every_resource_of_a_shipped_stack_has_a_cost_or_a_reason(stack: str) -> None:
    made = real(stack)
    unpriced = {key for key, usd in made.lock.lines_usd.items() if usd is None}
    assert set(made.bill.unpriced) == unpriced
    assert all(cost.lines or cost.why for cost in made.bill.costs)
    assert all(key.startswith("people/") for key in made.bill.elsewhere)


@each_stack
def test_the_pools_of_a_shipped_stack_are_those_of_its_plan(stack: str) -> None:
    made = real(stack)
    named = [r.inputs["agentPoolName"] for r in made.resources if r.kind == POOL]
    assert sorted(named) == sorted(pool.name for pool in made.lock.pools)
    paid = {r.name: cost.usd for r, cost in zip(made.resources, made.bill.costs, strict=True) if r.kind == POOL}
    assert all((paid[pool.name] == 0) is pool.fallback for pool in made.lock.pools)


@each_stack
def test_a_shipped_stack_is_one_tree(stack: str) -> None:
    made = real(stack)
    urns = [r.urn for r in made.resources]
    assert len(set(urns)) == len(urns)
    assert {r.parent for r in made.resources} <= {"", *urns}
    assert all(set(r.dependencies) <= set(urns) for r in made.resources)


def test_two_previews_of_a_stack_are_the_same_whatever_ran_between() -> None:
    first, _ = real("dev-2k"), real("prod-enterprise")
    with contextlib.chdir(ROOT):
        again = previews.preview("dev-2k")
    assert previews.shown(again) == previews.shown(first)
    assert [r.name for r in again.resources] == [r.name for r in first.resources]


@pytest.mark.parametrize("form", [(), ("--json",), ("--format", "md")])
def test_the_real_program_shows_no_secret_in_any_form(project: Path, form: tuple[str, ...]) -> None:
    about = yaml.safe_load((project / "Pulumi.yaml").read_text()) | {"main": str(ROOT / "infra")}
    (project / "Pulumi.yaml").write_text(yaml.safe_dump(about))
    secrets = {f"tonnage:{key}": {"secure": f"v1:{CANARY}"} for key in ("apiKey", "hfToken")}
    write_stack(project, intent_of("dev-32k"), real("dev-32k").lock, **secrets)
    outcome = golden.run((*COMMAND, *form))
    assert "dev-32k" in outcome.stdout
    assert CANARY not in outcome.stdout + outcome.stderr
    assert PLACEHOLDER not in outcome.stdout + outcome.stderr


@each_stack
def test_every_row_of_the_tree_begins_with_its_guide_at_80_columns(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = real(stack)
    monkeypatch.setattr(previews, "preview", lambda _: made)
    # 1,416.11 + ? is wider than the heading of its column
    known = made.bill.costs[0]._replace(usd=Decimal("1416.11"), lines=("x",), unpriced=("y",))
    assert golden.run(("preview", "--stack", stack), 80).exit_code == 0
    dear = dataclasses.replace(made, bill=made.bill._replace(costs=(known, *made.bill.costs[1:])))
    for one in (made, dear):
        monkeypatch.setattr(previews, "preview", lambda _, one=one: one)
        said = golden.run(("preview", "--stack", stack), 80).stdout.splitlines()
        heading = next(n for n, line in enumerate(said) if line.startswith(" resource "))
        column = said[heading].index(" type ") + 1
        last = next(n for n, line in enumerate(said) if line.startswith(" total "))
        rows = said[heading + 2 : last - len(made.bill.elsewhere)]
        # a row that begins has a type, those that go on have none
        guides = iter(branches(previews.shown(one)))
        for line in rows:
            if line[column] != " ":
                branch = next(guides)
                assert line.startswith(f" {branch.guide}"), line
            else:
                assert line.startswith(f" {branch.below}"), line
        assert next(guides, None) is None


@pytest.mark.parametrize("columns", [80, 160])
def test_a_shipped_stack_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = real("prod-standard")
    monkeypatch.setattr(previews, "preview", lambda _: made)
    said = golden.run(("preview", "--stack", "prod-standard"), columns).stdout.splitlines()
    assert all(len(line) <= columns for line in said if "pulumi config set" not in line)
    assert len(said) > 60


# ------------------------------------------------------------------------------------------------------ the examples

ACTIONS, PIPELINES = ROOT / "docs" / "ci" / "github-actions.yml", ROOT / "docs" / "ci" / "azure-pipelines.yml"


def scripts(node: Any) -> Iterator[str]:
    """Every shell script of a workflow or pipeline."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("run", "bash", "deploy", "inlineScript") and isinstance(value, str):
                yield value
            yield from scripts(value)
    elif isinstance(node, list):
        for value in node:
            yield from scripts(value)


@pytest.mark.parametrize("file", [ACTIONS, PIPELINES], ids=lambda file: file.stem)
def test_the_scripts_of_the_examples_are_bash_and_their_planner_commands_exist(file: Path) -> None:
    found = list(scripts(yaml.safe_load(file.read_text(encoding="utf-8"))))
    commands: list[list[str]] = []
    for script in found:
        plain = re.sub(r"\$\{\{.*?\}\}|\$\(\w+\)", "x", script)  # what is put in before bash sees it
        done = subprocess.run(["bash", "-n"], input=plain, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        commands += [shlex.split(line) for line in re.findall(r"\bplanner ([a-z][^|>\n]*)", plain)]
    assert sorted({command[0] for command in commands}) == ["plan", "preview"]
    group: Any = typer.main.get_command(app)
    for name, *arguments in commands:
        group.commands[name].make_context(name, arguments)  # refuses an option that is not there
    assert any("pulumi up --yes" in script for script in found)
    assert any("pulumi preview" in script for script in found)


@pytest.mark.parametrize("file", [ACTIONS, PIPELINES], ids=lambda file: file.stem)
@pytest.mark.parametrize(
    ("stub", "holds"),
    [
        (
            "echo 'said by the program' >&2; echo 'planner: no plan here: plan again' >&2; exit 2",
            "planner: no plan here",
        ),
        (
            "echo '<!-- tonnage-preview dev-32k -->'; echo '### a preview'; echo 'planner: grave' >&2; exit 1",
            "### a prev",
        ),
    ],
)
def test_the_comment_of_the_examples_says_what_a_preview_refuses(
    file: Path, stub: str, holds: str, tmp_path: Path
) -> None:
    (script,) = (found for found in scripts(yaml.safe_load(file.read_text(encoding="utf-8"))) if "said.txt" in found)
    (tmp_path / "uv").write_text(f"#!/bin/sh\n{stub}\n")
    (tmp_path / "uv").chmod(0o755)
    outside = {name: str(tmp_path / "out") for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "STACK": "dev-32k", **outside}
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    text = (tmp_path / "preview.md").read_text()
    assert text.startswith("<!-- tonnage-preview dev-32k -->\n")
    assert holds in text
    assert "said by the program" not in text
    assert "planner: " in done.stderr


def test_the_job_that_runs_a_pull_requests_code_has_no_credentials() -> None:
    jobs = yaml.safe_load(ACTIONS.read_text(encoding="utf-8"))["jobs"]
    assert jobs["plan"]["permissions"] == {"contents": "read", "pull-requests": "write"}
    assert "ARM" not in json.dumps(jobs["plan"])
    assert "pulumi " not in " ".join(scripts(jobs["plan"]))
    assert jobs["up"]["environment"] == "${{ matrix.stack }}"
    assert jobs["up"]["permissions"]["id-token"] == "write"
    assert all("secrets." not in json.dumps(job) for job in jobs.values())


def test_the_examples_use_no_anchors() -> None:
    # Azure Pipelines has none, nor have older servers of GitHub
    for file in (ACTIONS, PIPELINES):
        assert not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(file.read_text(encoding="utf-8")))
