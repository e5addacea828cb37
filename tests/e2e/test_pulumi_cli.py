"""The real engine, the language host and the stand-in for azure-native work together, on a small program."""

from collections.abc import Iterator
from pathlib import Path

import pulumi_cli
import pytest
import tools
from pulumi_cli import Project, short_urn, wait_until
from standin import serve
from standin.serve import Standins

STACK = "dev"
CANARY = "canary-value-of-a-secret"
CLUSTER = "azure-native:containerservice:ManagedCluster::aks"
POOL = "azure-native:containerservice:AgentPool::gpu"

PROJECT = """
name: scratch
runtime: {name: python, options: {toolchain: uv}}
main: infra/
stackConfigDir: stacks
config:
  azure-native:location: {value: swedencentral}
"""

PROGRAM = """
import pulumi
from pulumi_azure_native import containerservice, keyvault, resources

config = pulumi.Config()
group = resources.ResourceGroup("rg")
vault = keyvault.Vault(
    "kv",
    resource_group_name=group.name,
    properties=keyvault.VaultPropertiesArgs(
        tenant_id="11111111-2222-4333-8444-555555555555", sku=keyvault.SkuArgs(family="A", name="standard")
    ),
)
keyvault.Secret(
    "hf-token",
    resource_group_name=group.name,
    vault_name=vault.name,
    properties=keyvault.SecretPropertiesArgs(value=config.require_secret("token")),
)
cluster = containerservice.ManagedCluster(
    "aks",
    resource_group_name=group.name,
    resource_name_="aks",
    dns_prefix="aks",
    agent_pool_profiles=[
        containerservice.ManagedClusterAgentPoolProfileArgs(
            name="system", mode="System", count=1, vm_size="Standard_D4s_v5"
        )
    ],
    tags={"note": config.get("note") or "none"},
    opts=pulumi.ResourceOptions(ignore_changes=["agentPoolProfiles"]),
)
containerservice.AgentPool(
    "gpu",
    resource_group_name=group.name,
    resource_name_=cluster.name,
    agent_pool_name="gpu",
    vm_size=config.get("vm") or "Standard_NC24ads_A100_v4",
    enable_auto_scaling=True,
    min_count=0,
    max_count=config.get_int("max") or 2,
    count=0,
    opts=pulumi.ResourceOptions(ignore_changes=["count"]),
)
pulumi.export("vault", vault.properties.vault_uri)
"""


@pytest.fixture(scope="module")
def engines() -> tools.Engines:
    try:
        return tools.engines()
    except tools.Missing as why:
        pytest.skip(str(why))


@pytest.fixture
def standins(tmp_path: Path) -> Iterator[Standins]:
    running = serve.start(tmp_path / "standin")
    yield running
    running.stop()


@pytest.fixture
def project(tmp_path: Path, engines: tools.Engines, standins: Standins) -> Project:
    source = tmp_path / "source"
    for folder in ("infra", "stacks"):
        (source / folder).mkdir(parents=True)
    (source / "Pulumi.yaml").write_text(PROJECT)
    (source / "infra" / "__main__.py").write_text(PROGRAM)
    made = pulumi_cli.new_project(
        tmp_path / "pulumi",
        standins.debug_providers,
        pulumi=engines.pulumi,
        executor=engines.language_executor,
        language_host=engines.language_host,
        source=source,
    )
    assert made.init(STACK).rc == 0
    assert made.set_secret(STACK, "token", CANARY).rc == 0
    return made


def created(project: Project) -> None:
    done = project.up(STACK, "--skip-preview")
    assert done.rc == 0, done.output


def test_a_stack_comes_to_be_stays_as_it_is_changes_only_what_it_should_and_goes(
    project: Project, standins: Standins
) -> None:
    up = project.up(STACK)
    assert up.rc == 0, up.output
    assert up.operations()[POOL] == "create"
    seen = [up.output]
    same = project.preview(STACK, "--expect-no-changes")
    assert (same.rc, same.changed()) == (0, {}), same.output
    refresh = project.refresh(STACK)
    assert refresh.rc == 0, refresh.output
    same = project.preview(STACK, "--expect-no-changes")
    assert (same.rc, same.changed()) == (0, {}), same.output
    project.run("config", "set", "max", "4", stack=STACK)
    larger = project.up(STACK, "--skip-preview")
    assert (larger.rc, larger.changed()) == (0, {POOL: "update"}), larger.output
    assert larger.detailed_diff(POOL) == {"maxCount": {"diffKind": "update", "inputDiff": True}}
    project.run("config", "set", "vm", "Standard_NC48ads_A100_v4", stack=STACK)
    replaced = project.up(STACK, "--skip-preview")
    assert (replaced.rc, replaced.changed()) == (0, {POOL: "replace"}), replaced.output
    destroy = project.destroy(STACK)
    assert destroy.rc == 0, destroy.output
    assert standins.resources() == {}
    seen += [run.output for run in (same, refresh, larger, replaced, destroy)]
    assert not any(CANARY in text for text in seen)
    files = [*project.kept_files(), *standins.directory.iterdir()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_after_a_create_that_timed_out_the_next_up_completes(project: Project, standins: Standins) -> None:
    standins.set_faults({"type": "AgentPool", "fault": "timeout", "times": 1})
    failed = project.up(STACK, "--skip-preview")
    assert failed.rc != 0
    assert [resource for resource, message in failed.diagnostics() if "context deadline exceeded" in message] == [POOL]
    created(project)
    same = project.preview(STACK, "--expect-no-changes")
    assert same.rc == 0, same.output
    made = {short_urn(one["urn"]) for one in project.state(STACK) if one.get("custom")}
    providers = {name for name in made if name.startswith("pulumi:providers:")}
    # One resource more in Azure: the pool within the cluster.
    assert len(standins.resources()) == len(made - providers) + 1


def test_after_ctrl_c_during_a_create_the_next_up_completes(project: Project, standins: Standins) -> None:
    standins.set_faults({"type": "ManagedCluster", "fault": "slow", "seconds": 600, "times": 1})
    with project.started("up", "--yes", "--skip-preview", "--non-interactive", stack=STACK, events=True) as running:
        token = CLUSTER.split("::")[0]
        assert wait_until(lambda: bool(standins.journal(operation="create", type=token)), running)
        running.interrupt()
        stopped = running.result()
    assert stopped.rc != 0
    assert standins.journal(operation="cancel")
    standins.set_faults()
    created(project)
    same = project.preview(STACK, "--expect-no-changes")
    assert same.rc == 0, same.output
    assert project.destroy(STACK).rc == 0
    assert standins.resources() == {}
